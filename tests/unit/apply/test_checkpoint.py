from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors import deserialize

from semantic_ep.apply.checkpoint import (
    Checkpoint,
    apply_layout,
    checkpoint_fingerprint,
    undo_layout,
    writer,
)
from semantic_ep.apply.checkpoint.rewrite import CONFIG_KEY, LAYOUT_DIRECTORY
from semantic_ep.apply.layout import Layout
from semantic_ep.errors import CheckpointError, FingerprintError, PlacementError

FORMS = [
    ("qwen3_moe", "per expert", "BF16"),
    ("qwen3_moe", "fused", "F32"),
    ("mixtral", "per expert", "F8_E4M3"),
    ("gpt_oss", "fused", "BF16"),
    ("deepseek_v3", "per expert", "F8_E4M3"),
    ("deepseek_v3", "fused", "BF16"),
]


def tensors_of(directory: Path) -> dict[str, dict]:
    return {
        name: {**tensor, "data": bytes(tensor["data"])}
        for file in directory.glob("*.safetensors")
        for name, tensor in deserialize(file.read_bytes())
    }


def header_of(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


@pytest.fixture(params=FORMS, ids=lambda form: " ".join(form))
def form(request) -> dict[str, str]:
    return dict(zip(("model_type", "form", "dtype"), request.param))


@pytest.fixture
def source(tmp_path, write_checkpoint) -> Path:
    return write_checkpoint(tmp_path / "source")


@pytest.fixture
def applied(tmp_path, source, make_layout) -> Path:
    apply_layout(source, make_layout(source), tmp_path / "applied")
    return tmp_path / "applied"


@pytest.fixture
def refuses(tmp_path, make_layout, tree):
    """Assert that applying to a checkpoint fails with a message and leaves no trace."""

    def check(source: Path, message: str, *, layout: Layout, error=CheckpointError) -> None:
        before = tree(tmp_path)
        with pytest.raises(error, match=message):
            apply_layout(source, layout, tmp_path / "out")
        assert tree(tmp_path) == before
        assert not list(tmp_path.glob("*partial*"))

    return check


def test_each_slot_gets_the_router_row_and_the_weights_of_the_planned_expert(
    tmp_path, write_checkpoint, make_layout, form
) -> None:
    source = write_checkpoint(tmp_path / "source", **form)
    layout = make_layout(source)
    apply_layout(source, layout, tmp_path / "applied")
    before, after = tensors_of(source), tensors_of(tmp_path / "applied")
    expert_of = dict(zip(layout.fingerprint.layer_ids, layout.physical_to_logical_map.tolist()))
    compared = 0
    for name, tensor in after.items():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        if "shared" in name or not any(part in name for part in (".gate.", ".router.", ".experts")):
            assert tensor == before[name], name
            continue
        compared += 1
        words = name.split(".")
        index = words.index("experts") + 1 if "experts" in words else 0
        if index and words[index].isdecimal():
            words[index] = str(expert_of[layer][int(words[index])])
            assert tensor == before[".".join(words)], name
        else:
            rows = tensor["shape"][0]
            stored = np.frombuffer(tensor["data"], np.uint8).reshape(rows, -1)
            original = np.frombuffer(before[name]["data"], np.uint8).reshape(rows, -1)
            np.testing.assert_array_equal(stored, original[expert_of[layer]], err_msg=name)
    assert compared == len(Checkpoint.open(source).experts)


def test_names_dtypes_metadata_index_and_other_files_stay_as_they_are(
    tmp_path, write_checkpoint, make_layout, tree, form
) -> None:
    source = write_checkpoint(tmp_path / "source", **form)
    summary = apply_layout(source, make_layout(source), tmp_path / "applied")
    before, after = tree(source), tree(tmp_path / "applied")
    for file in source.glob("*.safetensors"):
        assert header_of(file) == header_of(tmp_path / "applied" / file.name)
    for name in ("model.safetensors.index.json", "tokenizer.json", "assets/note.txt"):
        assert before[name] == after[name]
    added = {name for name in after if name not in before}
    assert {Path(name).parts[0] for name in added} == {LAYOUT_DIRECTORY}
    assert summary.bytes == sum(len(before[name]) for name in before if name != "config.json")


def test_undo_restores_every_file_bit_for_bit(
    tmp_path, write_checkpoint, make_layout, tree, form
) -> None:
    source = write_checkpoint(tmp_path / "source", **form)
    apply_layout(source, make_layout(source), tmp_path / "applied")
    assert tensors_of(source) != tensors_of(tmp_path / "applied")
    undo_layout(tmp_path / "applied", tmp_path / "undone")
    assert tree(tmp_path / "undone") == tree(source)


def test_a_checkpoint_in_one_file_needs_no_index(
    tmp_path, write_checkpoint, make_layout, tree
) -> None:
    source = write_checkpoint(tmp_path / "source", shards=1)
    apply_layout(source, make_layout(source), tmp_path / "applied")
    undo_layout(tmp_path / "applied", tmp_path / "undone")
    assert tree(tmp_path / "undone") == tree(source)


def test_the_layout_is_recorded_inside(source, applied, make_layout) -> None:
    layout = Layout.read(applied / LAYOUT_DIRECTORY)
    np.testing.assert_array_equal(
        layout.physical_to_logical_map, make_layout(source).physical_to_logical_map
    )
    assert layout.fingerprint == checkpoint_fingerprint(source)
    config = json.loads((applied / "config.json").read_text())
    assert config.pop(CONFIG_KEY) == {"sha256": layout.sha256}
    assert config == json.loads((source / "config.json").read_text())


def test_a_plan_is_never_applied_twice(applied, make_layout, refuses) -> None:
    refuses(applied, "already applied.*--undo", layout=make_layout(applied))
    shutil.rmtree(applied / LAYOUT_DIRECTORY)
    refuses(applied, "already applied", layout=make_layout(applied))


def test_a_dry_run_checks_but_writes_nothing(tmp_path, source, make_layout, tree) -> None:
    before = tree(tmp_path)
    summary = apply_layout(source, make_layout(source), tmp_path / "applied", dry_run=True)
    assert tree(tmp_path) == before
    assert summary == apply_layout(source, make_layout(source), tmp_path / "applied")


def test_layers_beyond_the_model_keep_their_experts(
    tmp_path, write_checkpoint, make_layout
) -> None:
    extra = {
        f"model.layers.3.mlp.experts.{expert}.up_proj.weight": ("BF16", (2, 2))
        for expert in range(4)
    }
    source = write_checkpoint(tmp_path / "source", model_type="deepseek_v3", extra=extra)
    apply_layout(source, make_layout(source), tmp_path / "applied")
    before, after = tensors_of(source), tensors_of(tmp_path / "applied")
    assert all(before[name] == after[name] for name in extra)


def test_weights_in_other_forms_are_left_out_and_named(tmp_path, source, make_layout) -> None:
    (source / "original").mkdir()
    (source / "original" / "model.safetensors").write_bytes(b"other")
    (source / "pytorch_model.bin").write_bytes(b"other")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("ref")
    (source / "dangling").symlink_to("nowhere")
    (source / "folder").symlink_to(source / "assets")
    (source / "linked.txt").symlink_to(source / "tokenizer.json")
    summary = apply_layout(source, make_layout(source), tmp_path / "applied")
    assert summary.left_out == (
        "dangling",
        "folder",
        "pytorch_model.bin",
        "original/model.safetensors",
    )
    assert not (tmp_path / "applied" / "original").exists()
    assert not (tmp_path / "applied" / ".git").exists()
    assert (tmp_path / "applied" / "linked.txt").read_text() == '{"model": "none"}'


def test_memory_stays_at_one_buffer_whatever_the_size_of_the_tensors(
    tmp_path, write_checkpoint, make_layout
) -> None:
    large = {f"model.layers.{layer}.mlp.extra": ("BF16", (16 << 20,)) for layer in range(3)}
    source = write_checkpoint(tmp_path / "source", extra=large)
    layout = make_layout(source)
    tracemalloc.start()
    try:
        apply_layout(source, layout, tmp_path / "applied")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert writer.BUFFER_BYTES <= peak < 4 * writer.BUFFER_BYTES


def test_a_plan_of_another_model_is_refused(
    tmp_path, source, write_checkpoint, make_layout, refuses
) -> None:
    other = write_checkpoint(tmp_path / "other", model_type="mixtral")
    refuses(source, "layer_ids", layout=make_layout(other), error=FingerprintError)


def test_a_plan_made_before_more_training_needs_permission(
    tmp_path, source, write_checkpoint, make_layout, refuses
) -> None:
    older = make_layout(write_checkpoint(tmp_path / "older", seed=1))
    refuses(source, "router_sha256.*--allow-retrained", layout=older, error=FingerprintError)
    apply_layout(source, older, tmp_path / "applied", allow_retrained=True)
    recorded = Layout.read(tmp_path / "applied" / LAYOUT_DIRECTORY)
    assert recorded.fingerprint == checkpoint_fingerprint(source)


def test_a_plan_that_breaks_router_groups_is_refused(tmp_path, write_checkpoint, refuses) -> None:
    source = write_checkpoint(tmp_path / "source", model_type="deepseek_v3")
    layout = Layout(
        physical_to_logical_map=np.array([[0, 1, 2, 3], [0, 2, 1, 3]]),
        fingerprint=checkpoint_fingerprint(source),
    )
    refuses(source, "layer 2: the router keeps", layout=layout, error=PlacementError)


def test_an_existing_output_is_never_overwritten(tmp_path, source, make_layout, tree) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="the output exists"):
        apply_layout(source, make_layout(source), tmp_path / "out")
    assert tree(tmp_path) == before
    with pytest.raises(CheckpointError, match="the output exists"):
        apply_layout(source, make_layout(source), source)


def test_an_output_inside_the_source_is_refused(source, make_layout, tree) -> None:
    before = tree(source)
    with pytest.raises(CheckpointError, match="inside the source"):
        apply_layout(source, make_layout(source), source / "applied")
    assert tree(source) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), "1 of 2 shards are missing"),
        (lambda d: (d / "model.safetensors.index.json").unlink(), "neither model.safetensors nor"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "config.json").unlink(), "cannot read this file.*No such file"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), "is not JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "no JSON object"),
        (lambda d: _edit(d, model_type="qwen3_mo"), "family is not known.*qwen3_mo.*qwen3_moe"),
        (lambda d: _edit(d, num_experts=None), "lacks a positive num_experts"),
        (lambda d: _edit(d, num_experts=5), "first axis|must exist for the experts 0..4"),
        (lambda d: _edit(d, mlp_only_layers=[0]), "layer 0 is dense"),
        (lambda d: _edit(d, mlp_only_layers=[]), "layer 1 of this qwen3_moe lacks its router"),
        (lambda d: _cut(d, -1), "truncated or corrupt"),
        (lambda d: _cut(d, 40), "truncated or corrupt"),
        (lambda d: _cut(d, 4), "truncated or corrupt"),
        (lambda d: _cut(d, 0), "truncated or corrupt"),
        (lambda d: _duplicate(d), "is in two shards"),
        (lambda d: _move(d, "model.layers.0.mlp.gate.weight"), "index says that tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_checkpoints_are_refused_before_anything_is_written(
    source, make_layout, refuses, damage, message
) -> None:
    layout = make_layout(source)
    damage(source)
    refuses(source, message, layout=layout)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.mlp.gate.qzeros", (4, 2), "meaning there is unknown"),
        ("model.layers.0.mlp.experts.selector", (4, 2), "meaning there is unknown"),
        ("model.layers.0.mlp.gate.bias", (3,), "first axis"),
        ("model.layers.0.mlp.experts.7.up_proj.weight", (6, 3), "missing or unexpected: .7."),
        ("model.layers.0.mlp.experts.1.up_proj.zeros", (6, 3), "missing or unexpected: .0, 2, 3."),
    ],
)
def test_tensors_that_would_not_move_with_their_expert_are_refused(
    tmp_path, source, write_checkpoint, make_layout, refuses, name, shape, message
) -> None:
    odd = write_checkpoint(tmp_path / "odd", extra={name: ("BF16", shape)})
    refuses(odd, message, layout=make_layout(source))


def test_experts_of_different_precision_cannot_change_places(
    tmp_path, source, write_checkpoint, make_layout, refuses
) -> None:
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    mixed = write_checkpoint(tmp_path / "mixed", extra={name: ("F8_E4M3", (6, 3))})
    refuses(mixed, "differ in dtype or shape", layout=make_layout(source))


def test_undo_of_a_checkpoint_without_a_layout_is_refused(tmp_path, source, applied) -> None:
    with pytest.raises(CheckpointError, match="no plan was applied"):
        undo_layout(source, tmp_path / "undone")
    shutil.rmtree(applied / LAYOUT_DIRECTORY)
    with pytest.raises(CheckpointError, match=r"only it says how.*Copy semantic_ep_layout/"):
        undo_layout(applied, tmp_path / "undone")


def test_undo_with_the_layout_of_another_checkpoint_is_refused(
    tmp_path, source, applied, make_layout
) -> None:
    apply_layout(source, make_layout(source, seed=9), tmp_path / "second")
    shutil.rmtree(applied / LAYOUT_DIRECTORY)
    shutil.copytree(tmp_path / "second" / LAYOUT_DIRECTORY, applied / LAYOUT_DIRECTORY)
    with pytest.raises(CheckpointError, match="belongs to another checkpoint"):
        undo_layout(applied, tmp_path / "undone")


def test_undo_notices_one_flipped_bit_unless_told_that_the_model_was_trained(
    tmp_path, source, applied, tree
) -> None:
    shard = next(applied.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"changed since.*--allow-retrained"):
        undo_layout(applied, tmp_path / "undone")
    assert not (tmp_path / "undone").exists()
    undo_layout(applied, tmp_path / "undone", allow_retrained=True)
    changed = [name for name, old in tree(source).items() if tree(tmp_path / "undone")[name] != old]
    assert len(changed) == 1


def test_undo_keeps_edits_of_the_config(tmp_path, source, applied) -> None:
    _edit(applied, rope_theta=5)
    undo_layout(applied, tmp_path / "undone")
    expected = {**json.loads((source / "config.json").read_text()), "rope_theta": 5}
    assert json.loads((tmp_path / "undone" / "config.json").read_text()) == expected


def test_the_fingerprint_follows_the_router_and_the_tokenizer(
    tmp_path, source, applied, write_checkpoint
) -> None:
    own = checkpoint_fingerprint(source)
    assert own == checkpoint_fingerprint(write_checkpoint(tmp_path / "same"))
    permuted = checkpoint_fingerprint(applied)
    assert permuted.router_sha256 != own.router_sha256
    assert permuted.tokenizer_sha256 == own.tokenizer_sha256
    (source / "tokenizer.json").write_text("{}")
    assert checkpoint_fingerprint(source).tokenizer_sha256 != own.tokenizer_sha256


def _edit(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _cut(directory: Path, length: int) -> None:
    file = directory / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:length])


def _move(directory: Path, name: str) -> None:
    """Let the index name the wrong shard for a tensor."""
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    others = set(index["weight_map"].values()) - {index["weight_map"][name]}
    index["weight_map"][name] = others.pop()
    file.write_text(json.dumps(index))


def _duplicate(directory: Path) -> None:
    """Let both shards hold the same tensors."""
    first, second = sorted(directory.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
