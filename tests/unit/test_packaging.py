import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from semantic_ep import __version__
from semantic_ep.runtime.kernels import build

ROOT = Path(__file__).resolve().parents[2]
# What a package may hold, by its first two folders; everything else is the repository's.
SHIPPED = ("semantic_ep/", "semantic_ep-")
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


def sources(folder):
    return [p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts]


def run_setup(tree, *arguments):
    return run(tree, "setup.py", *arguments)


def run(tree, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
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


def test_sdist_and_wheel_build_from_each_other_and_pass_the_index_checks(tree):
    for tool in ("build", "twine"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed")
    # Without isolation: a test must not need the network. The wheel is made from the sdist.
    run(tree, "-m", "build", "--no-isolation", ".")
    files = sorted((tree / "dist").iterdir())
    assert {file.suffix for file in files} == {".whl", ".gz"}
    said = run(tree, "-m", "twine", "check", "--strict", *map(str, files))
    assert said.count("PASSED") == 2

    wheel, names = wheel_of(tree)
    assert all(name.startswith(SHIPPED) for name in names), sorted(names)
    packaged = {
        f"semantic_ep/patches/{p.relative_to(ROOT / 'patches')}" for p in sources("patches")
    }
    packaged |= {str(p.relative_to(ROOT)) for p in sources("semantic_ep")}
    assert packaged <= names
    data = (".npz", ".safetensors", ".jsonl", ".csv")
    assert not [name for name in names if name.endswith(data) or "/tests/" in name]
    metadata = zipfile.ZipFile(wheel).read(f"{SHIPPED[1]}{__version__}.dist-info/METADATA").decode()
    assert "Requires-Python: >=3.11\n" in metadata
    assert "Programming Language :: Python :: 3.11\n" in metadata

    (sdist,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "LICENSE", "README.md", f"{KERNELS}/csrc/moe.h"} <= inside


def test_the_command_tells_the_version_that_the_changelog_begins_with(capsys):
    from semantic_ep.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == f"semantic_ep {__version__}"
    headings = [
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")
    ]
    assert headings[0].split()[1] == __version__


@pytest.fixture(scope="module")
def requirements(tmp_path_factory):
    """Extra -> requirements, as the package's metadata state them."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    folder = tmp_path_factory.mktemp("metadata")
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    metadata = Path(folder / "semantic_ep.egg-info" / "PKG-INFO").read_text()
    return [
        Requirement(line.partition(": ")[2])
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ")
    ]


def test_every_extra_is_satisfied_by_the_versions_that_are_tested(requirements):
    named = (re.findall(r'extra == "(\w+)"', str(wanted.marker)) for wanted in requirements)
    extras = sorted({extra for names in named for extra in names})
    assert {"torch", "megatron", "deepspeed", "serve", "report", "all", "dev"} <= set(extras)
    absent = []
    for extra in ["", *extras]:
        for wanted in requirements:
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
                continue
            try:
                found = version(wanted.name)
            except PackageNotFoundError:
                absent.append(wanted.name)
                continue
            assert wanted.specifier.contains(found, prereleases=True), f"{extra}: {wanted}, {found}"
    if absent:
        pytest.skip(f"not installed: {', '.join(sorted(set(absent)))}")


def test_pinned_versions_are_ones_that_the_package_accepts(requirements):
    pins = {}
    for line in (ROOT / "launch/constraints.txt").read_text().splitlines():
        if line.partition("#")[0].strip():
            pin = Requirement(line.partition("#")[0].strip())
            pins[pin.name] = str(pin.specifier).removeprefix("==")
    assert "torch" in pins
    for wanted in requirements:
        if wanted.name in pins and (wanted.marker is None or _applies(wanted, "3.11")):
            assert wanted.specifier.contains(pins[wanted.name]), f"{wanted}: {pins[wanted.name]}"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_each_python_has_one_megatron(requirements, python):
    found = [r for r in requirements if r.name == "megatron-core" and _applies(r, python)]
    assert len({str(r.specifier) for r in found}) == 1


def _applies(requirement, python):
    return any(
        requirement.marker.evaluate({"extra": extra, "python_version": python})
        for extra in re.findall(r'extra == "(\w+)"', str(requirement.marker))
    )
