"""The scripts in launch/ as modules."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

LAUNCH = Path(__file__).resolve().parents[1] / "launch"


@functools.cache
def load_script(name: str) -> ModuleType:
    """Import launch/NAME.py as if it were started, without leaving launch/ on the path."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", LAUNCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made.
    sys.modules[spec.name] = module
    sys.path.insert(0, str(LAUNCH))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(LAUNCH))
    return module
