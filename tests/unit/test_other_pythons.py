"""Python 3.12 and 3.13: all files compile without a warning there, and what needs no torch works.

Interpreters are those on the path and pyenv's. Their environments are made once a machine, in the
user's cache directory; without an interpreter, or without an index to install from, tests skip.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = [version for version in ("3.12", "3.13") if f"{sys.version_info.minor}" != version[2:]]
TOOLS = ["pytest>=8.2", "pytest-timeout>=2.3", "hypothesis>=6.100"]
# What plans, reads and writes, without torch.
TESTS = (
    *("plan/test_placement.py", "plan/test_cost.py", "observe/test_import_command.py"),
    *("apply/test_layout.py", "apply/test_exporters.py"),
    *("test_artifacts.py", "test_config.py", "test_errors.py", "test_topology.py"),
)


@pytest.fixture(params=VERSIONS)
def interpreter(request):
    version = request.param
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for candidate in filter(None, found):
        asked = [candidate, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
        if done.stdout.strip() == version:
            return str(candidate)
    pytest.skip(f"there is no Python {version} on this machine")


def requirements():
    """What setup.py installs without an extra."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py has no install_requires")


@pytest.fixture
def other_python(interpreter):
    """An interpreter with the package's base requirements, made anew when they change."""
    wanted = [*requirements(), *TOOLS]
    key = hashlib.sha256("\n".join([interpreter, *wanted]).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "semantic_ep"
    directory = cache / "tests" / f"python-{key}"
    python = directory / "bin" / "python"
    if not (directory / "complete").is_file():
        shutil.rmtree(directory, ignore_errors=True)
        make = [interpreter, "-m", "venv", "--without-pip", str(directory)]
        subprocess.run(make, check=True, timeout=120)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        done = subprocess.run([*pip, *wanted], capture_output=True, text=True, timeout=1500)
        if done.returncode != 0:
            why = re.sub(r"\s+", " ", done.stderr[-300:])
            pytest.skip(f"cannot install the base requirements for {interpreter}: {why}")
        (directory / "complete").touch()
    return str(python)


def run(command, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    environment |= {"PYTHONPYCACHEPREFIX": str(tmp_path / "compiled"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500
    )


def test_every_file_compiles_without_a_warning(interpreter, tmp_path):
    folders = ("semantic_ep", "patches", "launch", "benchmarks")
    done = run([interpreter, "-W", "error", "-m", "compileall", "-q", *folders], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(3600)
def test_what_needs_no_torch_works(other_python, tmp_path):
    asked = run([other_python, "-m", "semantic_ep.cli", "plan", "--help"], tmp_path)
    assert asked.returncode == 0, asked.stderr
    assert "--ep-size" in asked.stdout
    tests = [f"tests/unit/{name}" for name in TESTS]
    pytest_ = [other_python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = run([*pytest_, *tests], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)
