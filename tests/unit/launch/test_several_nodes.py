"""The examples for several nodes are what bash, Slurm's header and DeepSpeed's launcher accept."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[3] / "launch"
BATCH_SCRIPTS = sorted(LAUNCH.glob("slurm/*.sbatch"))


def test_deepspeed_reads_the_example_hostfile():
    runner = pytest.importorskip("deepspeed.launcher.runner")
    hosts = runner.fetch_hostfile(str(LAUNCH / "hostfile.example"))
    assert dict(hosts) == {"node-1": 8, "node-2": 8}
    text = (LAUNCH / "hostfile.example").read_text()
    include = re.search(r'--include "([^"]+)"', text)[1]
    exclude = re.search(r'--exclude "([^"]+)"', text)[1]
    included = runner.parse_inclusion_exclusion(hosts, include, "")
    assert dict(included) == {"node-1": [0, 1, 2, 3], "node-2": list(range(8))}
    excluded = runner.parse_inclusion_exclusion(hosts, "", exclude)
    assert dict(excluded) == {"node-1": list(range(8)), "node-2": list(range(7))}


@pytest.mark.parametrize("script", BATCH_SCRIPTS, ids=lambda script: script.name)
def test_a_batch_script_parses_and_starts_a_script_that_exists(script):
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    lines = script.read_text().splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    # Slurm stops reading directives at the first command.
    assert directives
    assert max(directives) < first_command
    (started,) = re.findall(r"^\s*(launch/\w+\.py)", script.read_text(), re.MULTILINE)
    assert (LAUNCH.parent / started).is_file()


def test_there_is_a_batch_script():
    assert BATCH_SCRIPTS
