import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_schema_and_the_reference_are_current():
    done = subprocess.run(
        [sys.executable, "configs/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"run `python configs/generate.py`:\n{done.stdout}{done.stderr}"
