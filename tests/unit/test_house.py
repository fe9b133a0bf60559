"""The house keeps its order: imports point downwards, heavy imports are lazy, one CLI."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "semantic_ep"
HEAVY = {"torch", "deepspeed", "megatron", "transformers", "wandb", "matplotlib"}


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_the_import_contracts_hold():
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("import-linter is not installed: pip install -e .[dev]")
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_nothing_but_the_command_line_imports_the_patches():
    for file in PACKAGE.rglob("*.py"):
        if file.is_relative_to(PACKAGE / "cli"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for module in modules:
                assert not module.startswith("semantic_ep.patches"), f"{file} imports {module}"


def test_importing_the_package_imports_no_framework():
    loaded = run_python("import sys, semantic_ep, semantic_ep.patches; print(*sys.modules)").split()
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize(
    "module", ["plan.plan", "observe.profile", "apply.layout", "report", "topology", "tracking"]
)
def test_planning_and_reports_import_no_torch(module):
    loaded = run_python(f"import sys, semantic_ep.{module}; print(*sys.modules)").split()
    assert not {"torch", "transformers"} & set(loaded)


def test_help_is_fast_because_verbs_are_imported_when_used():
    code = (
        "import sys\nfrom semantic_ep.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    loaded = set(done.stderr.split())
    assert not (HEAVY | {"numpy", "scipy", "pydantic", "rich"}) & loaded
    times = [_user_seconds([sys.executable, "-m", "semantic_ep.cli", "--help"]) for _ in range(3)]
    assert min(times) < 0.3


def _user_seconds(command):
    """CPU seconds of a command: unlike wall time, the same on a busy machine."""
    before = os.times()
    subprocess.run(command, capture_output=True, check=True, timeout=60)
    after = os.times()
    return (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )


def test_every_verb_has_help():
    from semantic_ep.cli import VERBS

    for verb in VERBS:
        done = subprocess.run(
            [sys.executable, "-m", "semantic_ep.cli", verb, "--help"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert VERBS[verb].split(",")[0] in done.stdout.replace("\n", " ")


def test_an_unknown_verb_is_an_error():
    done = subprocess.run(
        [sys.executable, "-m", "semantic_ep.cli", "paln"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "plan" in done.stderr
