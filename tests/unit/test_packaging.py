import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from semantic_ep.runtime.kernels import build

ROOT = Path(__file__).resolve().parents[2]
KERNELS = "semantic_ep/runtime/kernels"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of what a wheel is made of, and no compiler but what a test puts into `CXX`."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    ignored = shutil.ignore_patterns("__pycache__", "lib", "*.egg-info")
    for name in ("semantic_ep", "patches"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "no-compilers"))
    if build.find_nvcc() is not None:
        pytest.skip("nvcc is installed as a wheel: compiling for GPUs takes too long here")
    return tmp_path


def run_setup(tree, *arguments):
    done = subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def compiler(tree, script, monkeypatch):
    path = tree / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def wheel_of(tree):
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel, set(zipfile.ZipFile(wheel).namelist())


def test_a_wheel_made_without_compilers_is_pure_and_can_build_its_libraries_later(tree):
    said = run_setup(tree, "bdist_wheel")
    wheel, files = wheel_of(tree)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "the cuda kernel library is left out: no compiler: needs nvcc" in said
    assert "the emulator kernel library is left out: no compiler: needs a C++17 compiler" in said
    sources = {f"{KERNELS}/csrc/{p.relative_to(build.SOURCES)}" for p in build.SOURCES.rglob("*.*")}
    assert sources | {f"{KERNELS}/README.md"} <= files
    assert not [name for name in files if name.startswith("tests") or name.endswith(".so")]


def test_a_wheel_with_a_library_is_for_one_platform_and_any_python(tree, monkeypatch):
    # Writes a file where a compiler would write a library.
    compiler(tree, 'while [ "$1" != -o ]; do shift; done; echo library > "$2"', monkeypatch)
    stale = tree / "build" / "lib" / KERNELS / "lib"
    stale.mkdir(parents=True)
    (stale / "libsemantic_ep_emulator-0123456789abcdef.so").write_text("of other sources")

    run_setup(tree, "bdist_wheel")
    wheel, files = wheel_of(tree)
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    libraries = {name for name in files if name.startswith(f"{KERNELS}/lib/")}
    assert libraries == {f"{KERNELS}/lib/libsemantic_ep_emulator-{build.source_hash()}.so"}


def test_an_editable_install_compiles_nothing(tree, monkeypatch):
    compiler(tree, f"echo compiled > {tree}/compiled; exit 1", monkeypatch)
    run_setup(tree, "editable_wheel")
    assert not (tree / "compiled").exists()
    run_setup(tree, "build_py")
    assert (tree / "compiled").exists()
