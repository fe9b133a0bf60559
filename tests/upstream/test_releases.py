"""Every release whose signatures are recorded keeps the contracts, in an environment of its own."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests.upstream.environments import ROOT, SIGNATURES, python_with

pytestmark = pytest.mark.upstream

# Those that start processes of their own say nothing of a release that the others do not.
TESTS = "not unmodified_script and not meta_device"


def _recorded(package: str) -> list[Version]:
    names = (file.stem for file in SIGNATURES.glob(f"{package}-*.json"))
    return sorted(Version(name.removeprefix(f"{package}-")) for name in names)


def _installed(package: str) -> Version | None:
    try:
        return Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def _newest_of_each_minor(package: str) -> list[str]:
    """Recorded releases of other minor versions than the installed one."""
    newest = {(version.major, version.minor): version for version in _recorded(package)}
    installed = _installed(package)
    if installed is not None:
        newest.pop((installed.major, installed.minor), None)
    return [str(newest[minor]) for minor in sorted(newest)]


def _others_of_deepspeed() -> list[Any]:
    """Recorded releases but the installed one, all of one minor version."""
    installed = _installed("deepspeed")
    others = [str(version) for version in _recorded("deepspeed") if version != installed]
    if others:
        return others
    reason = (
        "0.19.8 is the only release of deepspeed in the supported range, >=0.19.8,<0.20. Record "
        "the next with: python -m tests.upstream.environments deepspeed VERSION"
    )
    return [pytest.param("", marks=pytest.mark.skip(reason=reason))]


def _keeps_the_contracts(package: str, version: str, framework: str) -> None:
    python = python_with(package, version)
    here = Path(__file__).parent
    files = here / f"test_{framework}_contract.py", here / "test_seams.py"
    (other,) = {"megatron", "deepspeed"} - {framework}
    chosen = f"{TESTS} and not {other}"
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", _newest_of_each_minor("megatron-core"))
def test_a_release_of_megatron_keeps_the_contracts_of_the_installed_one(version):
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    _keeps_the_contracts("megatron-core", version, "megatron")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", _others_of_deepspeed())
def test_a_release_of_deepspeed_keeps_the_contracts_of_the_installed_one(version):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    _keeps_the_contracts("deepspeed", version, "deepspeed")
