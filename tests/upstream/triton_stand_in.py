"""Stands for Triton when Megatron-core is imported where it is not installed.

Megatron-core from 0.17 on imports Triton unconditionally, for kernels that a CPU never runs. The
real one takes a gigabyte. Copied into the environments of `environments.py`, where a `.pth` file
imports it at start: then `import triton` in a module of Megatron finds names that do nothing, and
in any other module it fails as before.
"""

import importlib.abc
import importlib.util
import sys
import types


class _Inert:
    """Takes the place of every name: decorators return what they decorate."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args, **kwargs):
        decorates = len(args) == 1 and not kwargs and callable(args[0])
        return args[0] if decorates else self


class _Module(types.ModuleType):
    __version__ = "0"
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Inert()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "triton":
            return None
        frame = sys._getframe(1)
        while frame is not None and "importlib" in frame.f_globals.get("__name__", "importlib"):
            frame = frame.f_back
        if frame is None or not frame.f_globals.get("__name__", "").startswith("megatron."):
            return None
        # torch looks once whether Triton is there. It must have looked before this is.
        import torch._inductor.runtime.hints
        import torch._inductor.runtime.triton_compat
        import torch.utils._triton

        torch.utils._triton.has_triton_package()
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_Finder())
