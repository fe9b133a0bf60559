"""Builds the kernel libraries: one with nvcc for GPUs, one with the C++ compiler over the emulator.

Only the standard library is used, and nothing of `semantic_ep`: `setup.py` loads this file by path
at build time, before any dependency is installed. A library that cannot be built is not an error
here: the outcome says why, the dispatcher falls back, and `semantic-ep doctor` shows the reason.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Flavour = Literal["cuda", "emulator"]
Sanitizer = Literal["address", "thread"]

SOURCES = Path(__file__).resolve().parent / "csrc"
PACKAGED = Path(__file__).resolve().parent / "lib"
CACHE_VARIABLE = "SEMANTIC_EP_CACHE"
CUDA_ARCHITECTURES = ("80", "90", "100")
COMPILE_TIMEOUT_S = 900

# -ffp-contract=off: sums round the same on every CPU. The kernels read rows as several types.
_CXX_FLAGS = ("-std=c++17", "-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-w")
_NVCC_FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-lineinfo", "-t", "0")
_SANITIZER_FLAGS: dict[Sanitizer, tuple[str, ...]] = {
    "address": ("-O1", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"),
    "thread": ("-O1", "-fsanitize=thread"),
}


@dataclass(frozen=True, kw_only=True)
class BuildOutcome:
    """A library, or the reason why there is none."""

    flavour: Flavour
    path: Path | None
    reason: str


def find_cxx() -> Path | None:
    """The C++ compiler: `CXX`, else the first of c++, g++, clang++ on the path."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return Path(found)
    return None


def find_nvcc() -> Path | None:
    """nvcc of `CUDA_HOME` or `CUDA_PATH`, of the path, or of the `nvidia-cuda-nvcc` wheel."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidate = Path(os.environ[variable]) / "bin" / "nvcc"
            if candidate.is_file():
                return candidate
    found = shutil.which("nvcc")
    if found:
        return Path(found)
    for root in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}:
        wheels = sorted(Path(root).glob("nvidia/cu*/bin/nvcc"), reverse=True) if root else []
        if wheels:
            return wheels[0]
    return None


def source_hash() -> str:
    """Names the sources and the flags: a library built from others is never loaded by mistake."""
    digest = hashlib.sha256(repr((_CXX_FLAGS, _NVCC_FLAGS, CUDA_ARCHITECTURES)).encode())
    for path in sorted(p for p in SOURCES.rglob("*") if p.is_file()):
        digest.update(path.relative_to(SOURCES).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_directory() -> Path:
    """`SEMANTIC_EP_CACHE`, else `$XDG_CACHE_HOME/semantic_ep`, else `~/.cache/semantic_ep`."""
    configured = os.environ.get(CACHE_VARIABLE)
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "semantic_ep"


def find_library(flavour: Flavour, *, build: bool = True) -> BuildOutcome:
    """The library of this flavour: packaged, else cached, else built into the cache.

    Args:
        flavour: "cuda" or "emulator".
        build: compile it when there is none. Several processes may call at once; one compiles.
    """
    name = _library_name(flavour)
    for directory in (PACKAGED, cache_directory() / "kernels"):
        if (directory / name).is_file():
            return BuildOutcome(flavour=flavour, path=directory / name, reason="built before")
    if not build:
        return BuildOutcome(flavour=flavour, path=None, reason=f"{name} has not been built")
    return build_library(flavour, cache_directory() / "kernels")


def build_library(flavour: Flavour, directory: Path) -> BuildOutcome:
    """Compiles one library into `directory`, atomically; a failure is an outcome, not an error."""
    compiler = find_nvcc() if flavour == "cuda" else find_cxx()
    if compiler is None:
        wanted = (
            "nvcc on PATH, CUDA_HOME, or `pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm"
            " nvidia-cuda-runtime nvidia-cuda-cccl`"
            if flavour == "cuda"
            else "a C++17 compiler on PATH or in CXX"
        )
        return BuildOutcome(flavour=flavour, path=None, reason=f"no compiler: needs {wanted}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / _library_name(flavour)
        with _locked(target):
            if not target.is_file():
                if flavour == "cuda":
                    compile_cuda(target, nvcc=compiler)
                else:
                    compile_emulator(target, cxx=compiler)
    except subprocess.CalledProcessError as error:
        return BuildOutcome(
            flavour=flavour, path=None, reason=f"{compiler} failed:\n{error.stderr}"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return BuildOutcome(flavour=flavour, path=None, reason=f"{compiler}: {error}")
    return BuildOutcome(flavour=flavour, path=target, reason=f"built with {compiler}")


def known_architectures(nvcc: Path) -> list[str]:
    """Those of `CUDA_ARCHITECTURES` that this nvcc can compile for: sm_100 came with CUDA 12.8.

    Raises:
        OSError: It knows none, or does not run.
    """
    done = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True)
    listed = done.stdout.split()
    known = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in listed]
    if not known:
        wanted = ", ".join(f"sm_{arch}" for arch in CUDA_ARCHITECTURES)
        raise OSError(f"compiles for none of {wanted}; it says: {done.stdout}{done.stderr}")
    return known


def compile_cuda(
    target: Path,
    *,
    nvcc: Path,
    architectures: Sequence[str] | None = None,
    extra: Sequence[str] = (),
) -> str:
    """Compiles code for each architecture and PTX of the last; returns nvcc's messages.

    Args:
        target: The shared library to write.
        nvcc: The compiler.
        architectures: Such as "90"; None: `known_architectures`.
        extra: More flags.

    Raises:
        OSError: nvcc does not run, or knows none of the architectures.
        subprocess.CalledProcessError: nvcc failed; `stderr` has its messages.
    """
    architectures = known_architectures(nvcc) if architectures is None else architectures
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    last = architectures[-1]
    codes.append(f"-gencode=arch=compute_{last},code=compute_{last}")
    wheel_lib = nvcc.parent.parent / "lib"
    link = [f"-L{wheel_lib}"] if wheel_lib.is_dir() else []
    return _run_to(
        target, [str(nvcc), *_NVCC_FLAGS, *codes, *extra, *link, str(SOURCES / "library.cu")]
    )


def compile_emulator(
    target: Path, *, cxx: Path, sanitizer: Sanitizer | None = None, defines: Sequence[str] = ()
) -> str:
    """Compiles the kernels over the emulator; returns the compiler's messages.

    Args:
        target: The shared library to write.
        cxx: The compiler.
        sanitizer: "address" (with undefined behaviour) or "thread".
        defines: Macros, such as the `MUTANT_*` bugs that tests plant.

    Raises:
        subprocess.CalledProcessError: the compiler failed; `stderr` has its messages.
    """
    flags = [*_CXX_FLAGS, *(_SANITIZER_FLAGS[sanitizer] if sanitizer else ("-O2",)), f"-I{SOURCES}"]
    macros = [f"-D{name}" for name in defines]
    kernels, scheduler = str(SOURCES / "library.cu"), str(SOURCES / "emu" / "emu.cpp")
    if sanitizer != "thread":
        command = [str(cxx), *flags, *macros, "-shared", "-x", "c++", kernels, scheduler]
        return _run_to(target, command)
    # The scheduler moves fibers about by hand; ThreadSanitizer must watch the kernels only.
    kernels_object, scheduler_object = target.with_suffix(".o"), target.with_name("scheduler.o")
    plain = [flag for flag in flags if not flag.startswith("-fsanitize")]
    messages = _run_to(kernels_object, [str(cxx), *flags, *macros, "-c", "-x", "c++", kernels])
    if not scheduler_object.is_file():
        command = [str(cxx), *plain, "-DEMU_TSAN", "-c", "-x", "c++", scheduler]
        messages += _run_to(scheduler_object, command)
    messages += _run_to(
        target,
        [str(cxx), "-shared", "-fsanitize=thread", str(kernels_object), str(scheduler_object)],
    )
    kernels_object.unlink()
    return messages


def _library_name(flavour: Flavour) -> str:
    return f"libsemantic_ep_{flavour}-{source_hash()}.so"


def _run_to(target: Path, command: list[str]) -> str:
    """Runs `command -o target` so that `target` appears whole or not at all."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        done = subprocess.run(
            [*command, "-o", str(partial)],
            check=True,
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
        )
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return done.stdout + done.stderr


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Lets one process at a time build `target`; the lock ends with its process."""
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
