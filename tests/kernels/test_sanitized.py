"""The kernels under sanitizers, and planted bugs that these tests must find."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from semantic_ep.runtime.kernels import build

ROOT = Path(__file__).resolve().parents[2]
# What breaks: memory order, barriers, waits, epochs, counting, the spreading of failures.
MUTANTS = [
    "RELAXED_READY_FLAG",
    "NO_BARRIER_BEFORE_PUBLISH",
    "RELAXED_FINISH_COUNTER",
    "NO_WAIT_FOR_READY",
    "RELAXED_FREE_FLAG",
    "FREE_BEFORE_LAST_BLOCK",
    "NO_WAIT_FOR_FREE",
    "ANY_EPOCH",
    "NO_CARRY_BETWEEN_CHUNKS",
    "NO_POISON",
]


def compiler() -> Path:
    found = build.find_cxx()
    if found is None:
        pytest.skip("no C++17 compiler on PATH or in CXX")
    return found


def sanitizer_runtime(cxx: Path, name: str) -> str:
    done = subprocess.run(
        [str(cxx), f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
    )
    path = Path(done.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"{cxx} has no lib{name}.so")
    return str(path.resolve())


def library_for(cxx: Path, sanitizer: str, *defines: str) -> Path:
    """Built once for each state of the sources."""
    directory = build.cache_directory() / "kernels" / f"tests-{build.source_hash()}"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{'-'.join([sanitizer, *defines])}.so"
    if not path.is_file():
        build.compile_emulator(path, cxx=cxx, sanitizer=sanitizer, defines=defines)
    return path


def run_suite(library: Path, suite: str, preload: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": preload,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        # Python itself leaks at exit; an error must change the exit code and not stop at the first.
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",
        "UBSAN_OPTIONS": "halt_on_error=1:exitcode=66:print_stacktrace=1",
        "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
    }
    script = Path(__file__).with_name("sanitized_run.py")
    return subprocess.run(
        [sys.executable, str(script), str(library), suite],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )


def test_no_address_error_and_no_undefined_behaviour():
    cxx = compiler()
    preload = sanitizer_runtime(cxx, "asan")
    done = run_suite(library_for(cxx, "address"), "all", preload)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "clean" in done.stdout


@pytest.fixture(scope="module")
def thread_sanitized():
    """The kernels as they are, and each mutant, compiled two at a time."""
    cxx = compiler()
    sanitizer_runtime(cxx, "tsan")
    correct = library_for(cxx, "thread", "SEP_ONE_TYPE")  # first: builds the shared scheduler too
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            name: pool.submit(library_for, cxx, "thread", "SEP_ONE_TYPE", f"MUTANT_{name}")
            for name in MUTANTS
        }
        return {"": correct} | {name: job.result() for name, job in jobs.items()}


def test_no_data_race(thread_sanitized):
    preload = sanitizer_runtime(compiler(), "tsan")
    done = run_suite(thread_sanitized[""], "protocol", preload)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "clean" in done.stdout


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_bug_is_found(thread_sanitized, mutant):
    preload = sanitizer_runtime(compiler(), "tsan")
    done = run_suite(thread_sanitized[mutant], "protocol", preload)
    found = [
        "WARNING: ThreadSanitizer: data race",
        "AssertionError",
        "emulator: ",  # deadlock or divergence
        "PeerFailureError",
        "BackendError",
    ]
    assert done.returncode != 0, f"{mutant} survives"
    assert any(text in done.stderr for text in found), done.stderr


def test_every_mutant_in_the_sources_is_tested():
    sources = "".join(path.read_text() for path in build.SOURCES.glob("*.h"))
    planted = {
        line.split("MUTANT_")[1].split()[0]
        for line in sources.splitlines()
        if line.startswith(("#ifdef MUTANT_", "#ifndef MUTANT_"))
    }
    assert planted == set(MUTANTS)
