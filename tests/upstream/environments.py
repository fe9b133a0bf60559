"""Virtual environments that hold another release of one framework, and else what is installed.

They are made once, in the user's cache (`SEMANTIC_EP_CACHE`), without dependencies: only the
release itself is fetched, a few megabytes, and built where it is no wheel. Run as a program, it
records the signatures of releases:

    python -m tests.upstream.environments megatron-core 0.18.2 0.19.2
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import pytest

from semantic_ep.runtime.kernels.build import cache_directory

ROOT = Path(__file__).parents[2]
SIGNATURES = ROOT / "patches" / "signatures"
_STAND_IN = Path(__file__).with_name("triton_stand_in.py")

_RECORD = """
import importlib.metadata, json, logging, sys, warnings
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
from packaging.specifiers import SpecifierSet
from semantic_ep.patches import registry
package, version = sys.argv[1], importlib.metadata.version(sys.argv[1])
parameters = {}
for seam in registry.seams():
    if seam.package == package and SpecifierSet(seam.versions).contains(version):
        owner, attribute = registry.resolve(seam.target)
        target = getattr(owner, attribute, registry.ABSENT)
        absent = target is registry.ABSENT
        parameters[seam.target] = "absent" if absent else registry.parameter_names(target)
print(json.dumps({"package": package, "parameters": parameters, "version": version}))
"""


def python_with(package: str, version: str) -> Path:
    """The interpreter of an environment with this release; skips the test where it cannot be had.

    Args:
        package: Distribution, "megatron-core" or "deepspeed".
        version: Its release; the Python versions that it states are not heeded.
    """
    installed = site.getsitepackages()
    key = repr((sys.version, installed, _STAND_IN.read_text()))
    name = f"{package}-{version}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    directory = cache_directory() / "releases" / name
    python = directory / "bin" / "python"
    if not python.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        # A pip that was stopped can leave a builder behind, which still writes.
        with tempfile.TemporaryDirectory(
            dir=directory.parent, prefix=".making-", ignore_cleanup_errors=True
        ) as making:
            _make(Path(making), f"{package}=={version}", installed)
            shutil.move(making, directory)
            os.mkdir(making)  # For the context, which removes it.
    return python


def _make(directory: Path, requirement: str, installed: list[str]) -> None:
    venv.create(directory, symlinks=True, clear=True)
    python = directory / "bin" / "python"
    pip = ["-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "-q"]
    exact = ["--no-deps", "--ignore-requires-python", "--retries", "1", "--timeout", "10"]
    command = [sys.executable, *pip, *exact, requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{requirement} cannot be installed here within 180 s")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        pytest.skip(f"{requirement} cannot be installed here: {reason}")
    packages = Path(
        sysconfig.get_path("purelib", "venv", {"base": directory, "platbase": directory})
    )
    shutil.copy(_STAND_IN, packages / "triton_stand_in.py")
    # Lines of a .pth file that import are run; those of the environment below come after.
    lines = [f"import site; site.addsitedir({path!r})" for path in installed]
    (packages / "below.pth").write_text("\n".join([*lines, "import triton_stand_in", ""]))


def signatures_in(python: Path, package: str) -> dict[str, object]:
    """What a file in `patches/signatures` says of the release that an interpreter finds."""
    done = subprocess.run(
        [python, "-c", _RECORD, package], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    record: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return record


def main(package: str, *versions: str) -> None:
    """Write the signatures of releases."""
    for version in versions:
        record = signatures_in(python_with(package, version), package)
        file = SIGNATURES / f"{package}-{record['version']}.json"
        file.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        print(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
