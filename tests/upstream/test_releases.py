"""Every release whose signatures are recorded keeps the contracts, in an environment of its own."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from tests.upstream.environments import ROOT, SIGNATURES, python_with

pytestmark = pytest.mark.upstream

PACKAGE = "megatron-core"
# Those that start processes of their own say nothing of a release that the others do not.
TESTS = "not unmodified_script and not meta_device"


def _newest_of_each_minor() -> list[str]:
    """Recorded releases of other minor versions than the installed one."""
    newest: dict[tuple[int, int], Version] = {}
    for file in SIGNATURES.glob(f"{PACKAGE}-*.json"):
        version = Version(file.stem.removeprefix(f"{PACKAGE}-"))
        minor = (version.major, version.minor)
        newest[minor] = max(newest.get(minor, version), version)
    installed = Version(metadata.version(PACKAGE))
    newest.pop((installed.major, installed.minor), None)
    return [str(newest[minor]) for minor in sorted(newest)]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", _newest_of_each_minor())
def test_a_release_keeps_the_contracts_of_the_installed_one(version):
    python = python_with(PACKAGE, version)
    contracts = Path(__file__).with_name("test_megatron_contract.py")
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", TESTS, contracts],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout
