"""Megatron-core on CPU with gloo: for tests and small runs, never where there is a GPU.

Megatron-core names CUDA devices and streams outright. Where torch has no GPU, these seams answer
such calls with the CPU. Replacements of torch functions act on calls from Megatron's own modules
only; every other caller sees torch as it is.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

from semantic_ep.patches.registry import ABSENT, Seam

_VERSIONS = ">=0.16,<0.20"


def _gpu_present() -> str | None:
    import torch

    return "this machine has a GPU" if torch.cuda.is_available() else None


def _fixed_since(version: str) -> Callable[[], str | None]:
    """Make an `inactive` for a defect of the releases before `version`."""

    def inactive() -> str | None:
        from packaging.version import Version

        found = metadata.version("megatron-core")
        if Version(found) >= Version(version):
            return f"megatron-core {found} has no such defect"
        return _gpu_present()

    return inactive


def _called_by_megatron() -> bool:
    """Whether the caller of the replacement that asks lives in a module of Megatron."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.")


class _NullStream:
    """Stands for a CUDA stream and for its events: work on a CPU is done when it returns."""

    def wait_stream(self, other: object) -> None:
        pass

    def record_event(self) -> _NullStream:
        return self

    def synchronize(self) -> None:
        pass


_NULL_STREAM = _NullStream()


def _answer_megatron(answer: Callable[..., Any]) -> Callable[[Any], Any]:
    """Make a `wrap` that gives Megatron `answer(...)`, and every other caller the original."""

    def wrap(original: Any) -> Any:
        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if _called_by_megatron():
                return answer(*args, **kwargs)
            return original(*args, **kwargs)

        return replacement

    return wrap


def _cpu_device() -> Any:
    import torch

    return torch.device("cpu")


def _cpu_seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _cpu_rng_state(*args: Any, **kwargs: Any) -> Any:
    import torch

    return torch.get_rng_state()


def _wrap_factory(original: Any) -> Any:
    """A tensor that Megatron wants on "cuda" is made on the CPU."""
    import torch

    # `torch.device` as a context keeps a table of the functions that make tensors, filled at its
    # first use. It must hold the originals, which the wrappers call, or models that others build
    # on "meta" would get their buffers on the CPU, with whatever values are there.
    with torch.device("meta"):
        torch.empty(0)

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if _called_by_megatron() and str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return original(*args, **kwargs)

    return factory


def _wrap_tensor_type(original: Any) -> Any:
    """Megatron's optimisers compare `tensor.type()` with names of CUDA tensor types."""

    @functools.wraps(original)
    def tensor_type(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        if isinstance(found, str) and _called_by_megatron():
            return found.replace("torch.", "torch.cuda.", 1)
        return found

    return tensor_type


def _wrap_get_rng_state(original: Any) -> Any:
    @functools.wraps(original)
    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
        if graph_safe:
            return original(device, clone, graph_safe)
        return _cpu_rng_state()

    return get_state


def _wrap_set_rng_state(original: Any) -> Any:
    import torch

    @functools.wraps(original)
    def set_state(new_state: Any, device: Any = -1, graph_safe: bool = False) -> None:
        if graph_safe:
            original(new_state, device, graph_safe)
        else:
            torch.set_rng_state(new_state)

    return set_state


def _wrap_move_to_cpu(original: Any) -> Any:
    import torch

    @functools.wraps(original)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = original(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    return move


def _seam(
    name: str,
    target: str,
    wrap: Callable[[Any], Any],
    *,
    parameters: tuple[str, ...] | None,
    why: str,
    remove_when: str = "Megatron-core asks torch for its accelerator instead of naming CUDA",
    may_be_absent: bool = False,
    inactive: Callable[[], str | None] = _gpu_present,
) -> Seam:
    return Seam(
        name=f"megatron.cpu.{name}",
        package="megatron-core",
        versions=_VERSIONS,
        target=target,
        parameters=parameters,
        why=why,
        remove_when=remove_when,
        wrap=wrap,
        may_be_absent=may_be_absent,
        inactive=inactive,
    )


_RANDOM = "megatron.core.tensor_parallel.random"
_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher"

SEAMS: tuple[Seam, ...] = (
    _seam(
        "current_device",
        "torch.cuda:current_device",
        _answer_megatron(_cpu_device),
        parameters=(),
        why="buffers and parameters are made on `torch.cuda.current_device()`, which raises",
    ),
    _seam(
        "current_stream",
        "torch.cuda:current_stream",
        _answer_megatron(lambda device=None: _NULL_STREAM),
        parameters=("device",),
        why="the all-to-all dispatcher orders its copies by the current CUDA stream",
    ),
    _seam(
        "stream",
        "torch.cuda:stream",
        _answer_megatron(lambda stream: contextlib.nullcontext()),
        parameters=("stream",),
        why="the all-to-all dispatcher copies its splits on a side stream",
    ),
    _seam(
        "synchronize",
        "torch.cuda:synchronize",
        _answer_megatron(lambda device=None: None),
        parameters=("device",),
        why="distributed checkpoints and pipeline exchanges wait for the GPU, which raises",
    ),
    _seam(
        "manual_seed",
        "torch.cuda:manual_seed",
        _answer_megatron(_cpu_seed),
        parameters=("seed",),
        why="a CUDA seed on a CPU is silently ignored, and every expert gets equal weights",
    ),
    _seam(
        "get_rng_state",
        "torch.cuda:get_rng_state",
        _answer_megatron(_cpu_rng_state),
        parameters=("device",),
        why="the random-state tracker reads the CUDA generator",
    ),
    *(
        _seam(
            name,
            f"torch:{name}",
            _wrap_factory,
            parameters=None,
            why='optimisers, schedules and checkpoints name device="cuda" literally',
        )
        for name in ("empty", "empty_like", "ones", "tensor", "zeros")
    ),
    _seam(
        "tensor_type",
        "torch:Tensor.type",
        _wrap_tensor_type,
        parameters=None,
        why="optimisers accept tensors of `torch.cuda.*Tensor` types only",
    ),
    _seam(
        "tracker_get_state",
        f"{_RANDOM}:_get_cuda_rng_state",
        _wrap_get_rng_state,
        parameters=("device", "clone", "graph_safe"),
        why="forking the random-state tracker reads the CUDA generator",
    ),
    _seam(
        "tracker_set_state",
        f"{_RANDOM}:_set_cuda_rng_state",
        _wrap_set_rng_state,
        parameters=("new_state", "device", "graph_safe"),
        why="the state is set in a callback that torch never runs without CUDA",
    ),
    _seam(
        "dispatcher_stream",
        f"{_DISPATCHER}:MoEAlltoAllTokenDispatcher.cuda_dtoh_stream",
        lambda original: _NULL_STREAM,
        parameters=None,
        why="the all-to-all dispatcher makes a CUDA stream when it finds none",
    ),
    _seam(
        "dispatcher_splits",
        f"{_DISPATCHER}:maybe_move_tensor_to_cpu",
        _wrap_move_to_cpu,
        parameters=("tensor", "as_numpy", "record_stream"),
        why="splits become numbers only when they come from a GPU; gloo rejects tensors",
    ),
    _seam(
        "latent_attention",
        "megatron.core.transformer.multi_latent_attention:HAVE_TE",
        lambda original: False,
        parameters=None,
        inactive=_fixed_since("0.17"),
        why="0.16 takes Transformer Engine as present, and asks whether a layer is of type None",
        remove_when="0.16 is no longer supported",
    ),
    _seam(
        "router_gemm",
        "megatron.core.transformer.moe.moe_utils:te_general_gemm",
        lambda original: None if original is ABSENT else original,
        parameters=None,
        inactive=_fixed_since("0.17"),
        may_be_absent=True,
        why="0.16 reads this name without defining it where Transformer Engine is absent",
        remove_when="0.16 is no longer supported",
    ),
)
