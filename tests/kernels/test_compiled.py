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
def nvcc():
    found = build.find_nvcc()
    if found is None:
        pytest.skip("no nvcc on PATH, in CUDA_HOME or from the nvidia-cuda-nvcc wheel")
    return found


@pytest.fixture(scope="module")
def cuobjdump():
    wheels = [path for root in sys.path for path in Path(root or ".").glob("nvidia/cu*/bin")]
    path = ":".join(map(str, wheels)) or None
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=path)
    if tool is None:
        pytest.skip("no cuobjdump on PATH or from the nvidia-cuda-cuobjdump wheel")
    return tool


@pytest.fixture(scope="module")
def compiled(nvcc, tmp_path_factory):
    """The library for one architecture, and what ptxas said."""
    library = tmp_path_factory.mktemp("cuda") / "kernels.so"
    messages = build.compile_cuda(library, nvcc=nvcc, architectures=["90"], extra=["-Xptxas", "-v"])
    return library, messages


@pytest.fixture(scope="module")
def sass(compiled, cuobjdump):
    """Machine code by kernel."""
    done = subprocess.run([cuobjdump, "-sass", str(compiled[0])], capture_output=True, text=True)
    if done.returncode and "nvdisasm" in done.stderr:
        pytest.skip(f"cuobjdump needs the nvidia-cuda-nvdisasm wheel: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
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


def test_the_library_holds_code_of_three_generations_and_ptx_for_later_ones(
    nvcc, cuobjdump, tmp_path
):
    architectures = build.known_architectures(nvcc)
    if architectures != list(build.CUDA_ARCHITECTURES):
        pytest.skip(f"{nvcc} compiles for {architectures} only")
    library = tmp_path / "kernels.so"
    build.compile_cuda(library, nvcc=nvcc, extra=["-DSEP_ONE_TYPE"])
    lists = {
        kind: subprocess.run(
            [cuobjdump, f"-l{kind}", str(library)], capture_output=True, text=True, check=True
        ).stdout
        for kind in ("elf", "ptx")
    }
    assert set(re.findall(r"\.sm_(\d+)\.cubin", lists["elf"])) == {"80", "90", "100"}
    assert "100" in re.findall(r"\.sm_(\d+)\.ptx", lists["ptx"])


def test_an_nvcc_compiles_for_what_it_knows(tmp_path):
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\necho compute_70; echo compute_80; echo compute_90\n")
    old.chmod(0o755)
    assert build.known_architectures(old) == ["80", "90"]
    old.write_text("#!/bin/sh\necho compute_50\n")
    with pytest.raises(OSError, match="none of sm_80, sm_90, sm_100"):
        build.known_architectures(old)


def test_nvcc_is_sought_in_cuda_home_then_on_the_path_then_in_wheels(tmp_path, monkeypatch):
    places = ["home/bin", "path", "site/nvidia/cu13/bin"]
    for place in places:
        tool = tmp_path / place / "nvcc"
        tool.parent.mkdir(parents=True)
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setattr(sys, "path", [])
    for place in places:
        assert build.find_nvcc() == tmp_path / place / "nvcc"
        (tmp_path / place / "nvcc").unlink()
    assert build.find_nvcc() is None
