"""Whatever stops a rewrite, its output is absent and its source is untouched."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semantic_ep.apply.checkpoint import apply_layout, undo_layout, writer
from semantic_ep.errors import CheckpointError, SemanticEPError


@pytest.fixture
def source(tmp_path, write_checkpoint) -> Path:
    return write_checkpoint(tmp_path / "work" / "source")


def fail_at(monkeypatch, function: str, call: int, code: int) -> list[int]:
    """Let the `call`-th call of an `os` function fail; returns a counter of calls."""
    original, calls = getattr(os, function), [0]

    def failing(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == call:
            raise OSError(code, os.strerror(code))
        return original(*args, **kwargs)

    monkeypatch.setattr(os, function, failing)
    return calls


@pytest.mark.parametrize(
    ("function", "code"),
    [
        ("write", errno.ENOSPC),
        ("fsync", errno.EIO),
        ("rename", errno.EACCES),
        ("replace", errno.ENOSPC),
        ("preadv", errno.EIO),
        ("mkdir", errno.EROFS),
    ],
)
def test_a_failure_of_any_single_system_call_leaves_nothing_behind(
    tmp_path, source, make_layout, tree, monkeypatch, function, code
) -> None:
    layout, output = make_layout(source), source.parent / "out"
    before = tree(tmp_path)
    call, failures = 0, 0
    while True:
        call += 1
        with monkeypatch.context() as patched:
            calls = fail_at(patched, function, call, code)
            message = None
            try:
                apply_layout(source, layout, output)
            except SemanticEPError as error:
                message = str(error)
        if message is not None:
            failures += 1
            assert os.strerror(code) in message
            assert tree(tmp_path) == before
            assert os.listdir(source.parent) == ["source"]
            continue
        if calls[0] >= call:
            # Forgiven: flushing the parent after the rename, making a directory that exists.
            assert function in ("fsync", "mkdir")
            shutil.rmtree(output)
            continue
        break
    assert failures >= (1 if function in ("rename", "mkdir") else 2)
    undo_layout(output, tmp_path / "undone")
    assert tree(tmp_path / "undone") == tree(source)


def test_short_writes_are_completed(tmp_path, source, make_layout, tree, monkeypatch) -> None:
    original = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: original(fd, data[:7]))
    monkeypatch.setattr(writer, "BUFFER_BYTES", 16)
    apply_layout(source, make_layout(source), tmp_path / "applied")
    undo_layout(tmp_path / "applied", tmp_path / "undone")
    assert tree(tmp_path / "undone") == tree(source)


def test_too_little_space_is_found_before_writing(
    tmp_path, source, make_layout, monkeypatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(CheckpointError, match="no space for the checkpoint"):
        apply_layout(source, make_layout(source), source.parent / "out")
    assert os.listdir(source.parent) == ["source"]


def test_a_directory_that_may_not_be_written_is_refused(source, make_layout) -> None:
    layout = make_layout(source)
    source.parent.chmod(0o555)
    effective = os.geteuid()
    opened = []
    try:
        if effective == 0:
            # Root passes every permission check, so be somebody else for the moment.
            opened = [path for path in source.parents if not path.stat().st_mode & 0o001]
            for path in opened:
                path.chmod(path.stat().st_mode | 0o055)
            os.seteuid(65534)
        with pytest.raises(CheckpointError, match="Permission denied"):
            apply_layout(source, layout, source.parent / "out")
    finally:
        os.seteuid(effective)
        for path in opened:
            path.chmod(0o700)
        source.parent.chmod(0o755)
    assert os.listdir(source.parent) == ["source"]


def test_an_output_below_a_file_is_refused(source, make_layout) -> None:
    (source.parent / "file").write_text("precious")
    with pytest.raises(CheckpointError, match=r"File exists|Not a directory"):
        apply_layout(source, make_layout(source), source.parent / "file" / "out")
    assert (source.parent / "file").read_text() == "precious"
    assert sorted(os.listdir(source.parent)) == ["file", "source"]


CHILD = """
import sys, time
from pathlib import Path
import numpy as np
from semantic_ep.apply.checkpoint import apply_layout, checkpoint_fingerprint
from semantic_ep.apply.layout import Layout

source, output, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
fingerprint = checkpoint_fingerprint(source)
rows = np.tile(np.arange(fingerprint.num_experts)[::-1], (fingerprint.num_layers, 1))
layout = Layout(physical_to_logical_map=rows, fingerprint=fingerprint)

def stall(count, total):
    print("writing", flush=True)
    if not limit:
        time.sleep(60)

apply_layout(source, layout, output, progress=stall)
"""


def start(source: Path, output: Path, limit: int = 0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(output), str(limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_file_size_limit_of_the_system_leaves_nothing_behind(source, tree) -> None:
    before = tree(source)
    largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
    child = start(source, source.parent / "out", limit=largest // 2)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "CheckpointError" in errors
    assert "File too large" in errors
    assert os.listdir(source.parent) == ["source"]
    assert tree(source) == before


def test_a_killed_rewrite_has_no_output_and_the_next_one_cleans_up(
    source, make_layout, tree
) -> None:
    before, output = tree(source), source.parent / "out"
    child = start(source, output)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    partial = [name for name in os.listdir(source.parent) if name != "source"]
    assert len(partial) == 1
    assert partial[0].startswith(".out.partial-")

    # A writer that lives keeps its work when another one comes to the same target.
    apply_layout(source, make_layout(source), output)
    assert (source.parent / partial[0]).exists()
    shutil.rmtree(output)

    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    assert not output.exists()
    assert tree(source) == before
    apply_layout(source, make_layout(source), output)
    assert sorted(os.listdir(source.parent)) == ["out", "source"]


def test_a_termination_signal_leaves_nothing_behind(tmp_path, source, tree) -> None:
    from_cli = CHILD.replace(
        "apply_layout(source, layout, output, progress=stall)",
        "import semantic_ep.cli as cli\n"
        "import semantic_ep.cli.apply as verb\n"
        "verb._rewrite = lambda args, progress: apply_layout(\n"
        "    source, layout, output, progress=stall)\n"
        "sys.exit(cli.main(['apply', '--checkpoint', str(source), '--undo', '-o', str(output)]))",
    )
    child = subprocess.Popen(
        [sys.executable, "-c", from_cli, str(source), str(source.parent / "out"), "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    started = time.monotonic()
    child.terminate()
    _, errors = child.communicate(timeout=60)
    assert time.monotonic() - started < 20
    assert child.returncode == 2
    assert "interrupted, nothing was written" in errors
    assert os.listdir(source.parent) == ["source"]


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_to_a_shard_is_refused_or_harmless(
    tmp_path_factory, write_checkpoint, make_layout, tree, data
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    source = write_checkpoint(root / "source", form="fused", dtype="F32")
    layout = make_layout(source)
    shard = data.draw(st.sampled_from(sorted(source.glob("*.safetensors"))))
    content = bytearray(shard.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, header - 1))
        content[position] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), len(content) - 4, header, 9]))]
    shard.write_bytes(content)
    try:
        apply_layout(source, layout, root / "applied", allow_retrained=True)
    except SemanticEPError:
        assert os.listdir(root) == ["source"]
    else:
        undo_layout(root / "applied", root / "undone")
        assert tree(root / "undone") == tree(source)
    finally:
        shutil.rmtree(root)
