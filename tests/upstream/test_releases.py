"""Releases whose signatures are recorded keep the contracts and train.

Each has an environment of its own, in which tests of this suite run.
"""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

from tests.upstream.environments import ROOT, SIGNATURES, python_with

pytestmark = pytest.mark.upstream

# Those that start processes of their own say nothing of a release that the others do not.
TESTS = "not unmodified_script and not meta_device"


# Runs on two gloo ranks: profiles equal a count by hand; a run that is resumed twice, under other
# placements and with the distributed optimizer, has the losses of a contiguous one.
TRAINING = (
    "distributed/test_megatron_observation.py::test_a_profile_counts_every_training_token_once_with_"
    "its_logical_experts[data]",
    "distributed/test_megatron.py::test_a_run_that_changes_placement_at_checkpoints_has_the_losses_"
    "of_a_contiguous_one[2-alltoall-True]",
)
# And of the newest release: the launch script from its command line, other parallelism, our
# exchange, copies of experts, and experts that move while the run goes on.
TRAINING_OF_NEWEST = (
    "distributed/test_megatron_observation.py",
    TRAINING[1],
    "distributed/test_megatron_dispatcher.py::test_our_exchange_has_the_losses_of_megatrons_alltoall_"
    "and_sends_fewer_bytes[2-settings0-True]",
    "distributed/test_megatron_copies.py::test_copies_train_alike_with_the_losses_and_norms_of_single_"
    "experts[2-divided]",
    "distributed/test_megatron_replanning.py::test_experts_and_their_optimizer_state_move_without_a_"
    "trace_in_the_losses[2-runs0]",
    "distributed/test_megatron_staged_replanning.py::test_a_failure_on_one_stage_leaves_all_of_them_"
    "as_they_were",
    "e2e/test_finetune_megatron.py::test_a_run_resumed_under_a_plan_goes_on_as_if_nothing_had_moved",
)

# Of the oldest release of DeepSpeed: AutoEP observed and balanced, native layers under a plan,
# Hugging Face models resumed under other plans, ZeRO 3.
TRAINING_OF_DEEPSPEED = (
    "distributed/test_deepspeed_training.py::test_the_profile_of_autoep_training_equals_a_brute_force_"
    "count",
    "distributed/test_deepspeed_training.py::test_the_balancing_loss_sees_all_ranks_and_recent_passes",
    "distributed/test_deepspeed_training.py::test_the_bias_of_a_router_is_observed_or_refused_where_"
    "autoep_leaves_it_out",
    "distributed/test_deepspeed_native_placed.py::test_a_plan_has_the_losses_of_deepspeeds_own_"
    "exchange[2-2-True]",
    "distributed/test_deepspeed_placed.py::test_a_resumed_run_goes_on_under_the_same_plan_another_plan_"
    "and_another_ep_size[2]",
    "distributed/test_deepspeed_zero3.py::test_a_plan_trains_resumes_and_exports_at_zero_3_as_a_model_"
    "that_is_not_spread",
)


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


def _others_of_deepspeed() -> list[str]:
    """Recorded releases but the installed one, oldest first; all are of one minor version."""
    installed = _installed("deepspeed")
    return [str(version) for version in _recorded("deepspeed") if version != installed]


def _keeps_the_contracts(package: str, version: str, framework: str) -> None:
    python = python_with(package, version)
    here = Path(__file__).parent
    files = here / f"test_{framework}_contract.py", here / "test_seams.py"
    (other,) = {"megatron", "deepspeed"} - {framework}
    chosen = f"{TESTS} and not {other}"
    _pass(python, "-k", chosen, *files)


def _finds(python: Path, package: str, version: str) -> None:
    """Ranks are started with the interpreter of the test, so that they find the release, too."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == version


def _pass(python: Path, *arguments: str | Path) -> None:
    """Run tests with an interpreter; none may fail, nor be skipped."""
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
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
@pytest.mark.parametrize("version", _newest_of_each_minor("megatron-core"))
def test_a_release_of_megatron_trains_as_the_installed_one(version):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if torch.cuda.is_available():
        pytest.skip("the seams for CPU, which these runs need, are inactive here")
    python = python_with("megatron-core", version)
    _finds(python, "megatron-core", version)
    newest = version == _newest_of_each_minor("megatron-core")[-1]
    chosen = TRAINING_OF_NEWEST if newest else TRAINING
    _pass(python, *(str(ROOT / "tests" / test) for test in chosen))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", _others_of_deepspeed())
def test_a_release_of_deepspeed_keeps_the_contracts_of_the_installed_one(version):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    _keeps_the_contracts("deepspeed", version, "deepspeed")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", _others_of_deepspeed()[:1])
def test_the_oldest_release_of_deepspeed_trains_as_the_installed_one(version):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    python = python_with("deepspeed", version)
    _finds(python, "deepspeed", version)
    _pass(python, *(str(ROOT / "tests" / test) for test in TRAINING_OF_DEEPSPEED))
