"""Apply the seams of SEMANTIC_EP_AUTOLOAD as soon as a script imports their framework.

Python runs a module of this name at start-up when its directory is on PYTHONPATH:

    PYTHONPATH="$(semantic-ep patches autoload)" SEMANTIC_EP_AUTOLOAD=megatron torchrun ... train.py

A `sitecustomize` further down the path runs as it would without this one. A name that is unknown
ends the process; a seam that does not fit makes the import of the framework fail with the reason.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

# The module after whose import everything that the seams touch can be imported.
TRIGGERS = {"megatron": "megatron.core", "deepspeed": "deepspeed"}


class _Applier(importlib.abc.MetaPathFinder):
    """Finds the trigger module as others do, and applies the seams once it has run."""

    def __init__(self, group):
        self._group = group

    def find_spec(self, name, path, target=None):
        if name != TRIGGERS[self._group]:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            execute, group = spec.loader.exec_module, self._group

            def exec_module(module):
                execute(module)
                import semantic_ep.patches

                semantic_ep.patches.apply(group)

            spec.loader.exec_module = exec_module
        return spec


def _run_shadowed():
    elsewhere = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_run_shadowed()
for _name in filter(None, os.environ.get("SEMANTIC_EP_AUTOLOAD", "").replace(" ", "").split(",")):
    if _name not in TRIGGERS:
        sys.exit(
            f"SEMANTIC_EP_AUTOLOAD: no seams for {_name!r}. Allowed: {', '.join(sorted(TRIGGERS))}."
        )
    sys.meta_path.insert(0, _Applier(_name))
