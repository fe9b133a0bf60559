import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from semantic_ep import artifacts
from semantic_ep.artifacts import ModelFingerprint, read_artifact, write_artifact
from semantic_ep.errors import ArtifactError, FingerprintError

FINGERPRINT = ModelFingerprint(
    architecture="qwen3_moe",
    layer_ids=(1, 2),
    num_experts=8,
    top_k=2,
    router_sha256="a" * 64,
    tokenizer_sha256="b" * 64,
)


def write(path, value=0, kind="profile"):
    return write_artifact(
        path,
        kind=kind,
        fingerprint=FINGERPRINT,
        arrays={"x": np.full((3, 4), value, dtype=np.float32)},
        meta={"value": value},
        parents={"profile": "c" * 64},
    )


def test_an_artefact_round_trips(tmp_path):
    digest = write(tmp_path / "a", 5)
    artifact = read_artifact(tmp_path / "a", kind="profile")
    assert artifact.fingerprint == FINGERPRINT
    assert artifact.meta == {"value": 5}
    assert artifact.parents == {"profile": "c" * 64}
    assert artifact.sha256 == digest
    np.testing.assert_array_equal(artifact.arrays["x"], np.full((3, 4), 5, dtype=np.float32))


def test_rewriting_replaces_the_data_and_leaves_no_stale_file(tmp_path):
    write(tmp_path / "a", 1)
    write(tmp_path / "a", 2)
    assert read_artifact(tmp_path / "a").meta == {"value": 2}
    assert len(list((tmp_path / "a").iterdir())) == 2


@pytest.mark.parametrize("position", [0, 8, 60, -1])
def test_one_altered_byte_is_found(tmp_path, position):
    write(tmp_path / "a")
    data = next((tmp_path / "a").glob("arrays-*"))
    content = bytearray(data.read_bytes())
    content[position] ^= 1
    data.write_bytes(content)
    with pytest.raises(ArtifactError, match="truncated or altered") as error:
        read_artifact(tmp_path / "a")
    assert str(data) in str(error.value)


def test_a_truncated_file_and_a_truncated_manifest_are_found(tmp_path):
    write(tmp_path / "a")
    data = next((tmp_path / "a").glob("arrays-*"))
    data.write_bytes(data.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match="truncated"):
        read_artifact(tmp_path / "a")
    manifest = tmp_path / "a" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"manifest is truncated"):
        read_artifact(tmp_path / "a")


def test_a_missing_artefact_a_missing_file_and_a_wrong_kind_are_told_apart(tmp_path):
    with pytest.raises(ArtifactError, match="no artefact here"):
        read_artifact(tmp_path / "nothing")
    write(tmp_path / "a")
    with pytest.raises(ArtifactError, match="this is a profile, not a plan"):
        read_artifact(tmp_path / "a", kind="plan")
    next((tmp_path / "a").glob("arrays-*")).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_artifact(tmp_path / "a")


def test_another_schema_version_is_refused(tmp_path):
    write(tmp_path / "a")
    manifest = tmp_path / "a" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "schema_version": 99}))
    with pytest.raises(ArtifactError, match="version 99"):
        read_artifact(tmp_path / "a")


def test_a_directory_with_other_things_or_another_kind_is_never_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="is not an artefact"):
        write(tmp_path / "mine")
    write(tmp_path / "a", kind="trace")
    with pytest.raises(ArtifactError, match="holds a trace"):
        write(tmp_path / "a", kind="plan")


@pytest.mark.parametrize("failing_call", range(4))
def test_a_full_disk_at_any_write_leaves_the_old_artefact(tmp_path, monkeypatch, failing_call):
    """Each artefact costs two flushes and two renames; each of the four is made to fail."""
    write(tmp_path / "a", 1)
    calls = 0

    def failing(original):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == failing_call + 1:
                raise OSError(28, "No space left on device")
            return original(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(artifacts.os, "fsync", failing(os.fsync))
    monkeypatch.setattr(artifacts.os, "replace", failing(os.replace))
    with pytest.raises(ArtifactError, match="No space left"):
        write(tmp_path / "a", 2)
    monkeypatch.undo()
    assert read_artifact(tmp_path / "a").meta == {"value": 1}
    assert not list((tmp_path / "a").glob(".*")), "a temporary file remains"


def test_a_writer_killed_at_any_moment_leaves_a_whole_artefact(tmp_path):
    script = f"""
import itertools, numpy as np
from semantic_ep.artifacts import ModelFingerprint, write_artifact
fingerprint = ModelFingerprint(architecture="x", layer_ids=(0,), num_experts=2, top_k=1)
for value in itertools.count():
    write_artifact({str(tmp_path / "a")!r}, kind="plan", fingerprint=fingerprint,
        arrays={{"x": np.full(200_000, value)}}, meta={{"value": value}})
    print(value, flush=True)
"""
    for delay in (0.0, 0.003, 0.011):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        artifact = read_artifact(tmp_path / "a", kind="plan")
        assert (artifact.arrays["x"] == artifact.meta["value"]).all()


def test_a_fingerprint_names_each_field_that_differs():
    other = dataclasses.replace(FINGERPRINT, num_experts=16, tokenizer_sha256="f" * 64)
    with pytest.raises(FingerprintError) as error:
        FINGERPRINT.check(other, what="the plan runs/x")
    for part in ("the plan runs/x", "num_experts: 16 instead of 8", "tokenizer_sha256"):
        assert part in str(error.value)


def test_a_retrained_router_is_refused_unless_allowed_and_unknown_hashes_match():
    retrained = dataclasses.replace(FINGERPRINT, router_sha256="e" * 64)
    with pytest.raises(FingerprintError, match="--allow-retrained"):
        FINGERPRINT.check(retrained, what="the plan")
    FINGERPRINT.check(retrained, what="the plan", allow_retrained=True)
    FINGERPRINT.check(dataclasses.replace(FINGERPRINT, router_sha256=""), what="the plan")
