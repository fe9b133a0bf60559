"""What nvcc makes of the kernels: no spills, few registers, wide accesses, ordered flags."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from semantic_ep.runtime.kernels import build

# 512 threads a block; 65536 registers a multiprocessor.
MOST_REGISTERS = 128


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The library for one architecture, and what ptxas said."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on PATH, in CUDA_HOME or from the nvidia-cuda-nvcc wheel")
    library = tmp_path_factory.mktemp("cuda") / "kernels.so"
    messages = build.compile_cuda(library, nvcc=nvcc, architectures=["90"], extra=["-Xptxas", "-v"])
    return library, messages


@pytest.fixture(scope="module")
def sass(compiled):
    """Machine code by kernel."""
    wheels = [path for root in sys.path for path in Path(root or ".").glob("nvidia/cu*/bin")]
    path = ":".join(map(str, wheels)) or None
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=path)
    if tool is None:
        pytest.skip("no cuobjdump on PATH or from the nvidia-cuda-cuobjdump wheel")
    done = subprocess.run([tool, "-sass", str(compiled[0])], capture_output=True, text=True)
    if done.returncode or "Function" not in done.stdout:
        pytest.skip(f"cuobjdump cannot disassemble: {done.stderr.strip()[:200]}")
    parts = re.split(r"\n\s*Function : (\S+)", done.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def kernel(sass, name, argument):
    """Code of the instance of a kernel template, such as send<Vec16>."""
    (code,) = (text for symbol, text in sass.items() if f"{len(name)}{name}I{argument}" in symbol)
    return code


def test_no_kernel_spills_registers(compiled):
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled[1])
    assert len(spills) > 20
    assert set(spills) == {("0", "0")}


def test_every_kernel_fits_its_launch_bounds(compiled):
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", compiled[1])]
    assert len(registers) > 20
    assert max(registers) <= MOST_REGISTERS


def test_rows_move_by_sixteen_bytes_several_loads_ahead_of_their_stores(sass):
    code = kernel(sass, "send", "5Vec16")
    accesses = re.findall(r"\b(LDG|STG|LD|ST)\.E\S*\.128\S*", code)
    assert "STG" in accesses or "ST" in accesses
    ahead = longest = 0
    for access in accesses:
        ahead = ahead + 1 if access.startswith("LD") else 0
        longest = max(longest, ahead)
    assert longest >= 4


@pytest.mark.parametrize(("name", "argument"), [("pull", "8BFloat16"), ("reduce", "8BFloat16")])
def test_sums_read_by_sixteen_bytes(sass, name, argument):
    wide = [text for symbol, text in sass.items() if f"{len(name)}{name}I{argument}Li8" in symbol]
    assert len(wide) == 1
    assert re.search(r"\bLDG?\.E\S*\.128", wide[0])


def test_a_system_wide_barrier_stands_before_every_flag(sass):
    for name in ("send", "expand", "scatter_send", "gather_send"):
        code = kernel(sass, name, "5Vec16")
        flags = [match.start() for match in re.finditer(r"\bSTG?\.E\.64\.STRONG\.SYS", code)]
        fences = [match.start() for match in re.finditer(r"\bMEMBAR\.\w+\.SYS", code)]
        assert flags, f"{name} stores no flag"
        assert fences, f"{name} has no system-wide barrier"
        assert all(any(fence < store for fence in fences) for store in flags)
