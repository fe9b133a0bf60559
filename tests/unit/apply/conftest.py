"""Small checkpoints whose bytes say which expert they belong to; no torch needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from semantic_ep.apply.checkpoint import checkpoint_fingerprint
from semantic_ep.apply.layout import Layout

EXPERTS, HIDDEN, INNER = 4, 6, 3
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
_BASE = {"num_hidden_layers": 3, "num_experts_per_tok": 2, "hidden_size": HIDDEN}
CONFIGS = {
    "qwen3_moe": {"num_experts": EXPERTS, "mlp_only_layers": [1], "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": EXPERTS},
    "gpt_oss": {"num_local_experts": EXPERTS},
    "deepseek_v3": {
        "n_routed_experts": EXPERTS,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
}
MOE_LAYERS = {
    "qwen3_moe": (0, 2),
    "mixtral": (0, 1, 2),
    "gpt_oss": (0, 1, 2),
    "deepseek_v3": (1, 2),
}

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def _expert_tensors(model_type: str, form: str, dtype: str) -> Tensors:
    tensors: Tensors = {}
    block = "block_sparse_moe" if (model_type, form) == ("mixtral", "per expert") else "mlp"
    names = ("w1", "w2", "w3") if model_type == "mixtral" else ("gate_proj", "down_proj", "up_proj")
    for layer in MOE_LAYERS[model_type]:
        prefix = f"model.layers.{layer}.{block}"
        router = "router" if model_type == "gpt_oss" else "gate"
        tensors[f"{prefix}.{router}.weight"] = ("F32", (EXPERTS, HIDDEN))
        if model_type == "gpt_oss":
            tensors[f"{prefix}.router.bias"] = ("F32", (EXPERTS,))
            tensors[f"{prefix}.experts.gate_up_proj_bias"] = (dtype, (EXPERTS, 2 * INNER))
            tensors[f"{prefix}.experts.gate_up_proj_blocks"] = ("U8", (EXPERTS, INNER, 2, 2))
        if model_type == "deepseek_v3":
            tensors[f"{prefix}.gate.e_score_correction_bias"] = ("F32", (EXPERTS,))
        if form == "fused":
            tensors[f"{prefix}.experts.gate_up_proj"] = (dtype, (EXPERTS, 2 * INNER, HIDDEN))
            tensors[f"{prefix}.experts.down_proj"] = (dtype, (EXPERTS, HIDDEN, INNER))
            continue
        for expert in range(EXPERTS):
            for name in names:
                tensors[f"{prefix}.experts.{expert}.{name}.weight"] = (dtype, (HIDDEN, INNER))
            if dtype == "F8_E4M3":
                scale = f"{prefix}.experts.{expert}.{names[0]}.weight_scale_inv"
                tensors[scale] = ("F32", (1, 1))
    return tensors


def _content(name: str, dtype: str, shape: tuple[int, ...], seed: int) -> bytes:
    """Bytes that depend on the whole name, so that each tensor can be told from every other."""
    key = int.from_bytes(hashlib.sha256(f"{seed}{name}".encode()).digest()[:8], "little")
    rng = np.random.default_rng(key)
    size = int(np.prod(shape)) * _ITEM_BYTES[dtype]
    if dtype == "F32":
        return rng.normal(size=shape).astype(np.float32).tobytes()
    return rng.integers(0, 256, size, dtype=np.uint8).tobytes()


def _safetensors(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A file as another library might write it: sorted by name, spaces in the header."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", "note": "µ"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        end = position + len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(dict(sorted(header.items())), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors.values())


def _write_checkpoint(
    directory: Path,
    *,
    model_type: str = "qwen3_moe",
    form: str = "per expert",
    dtype: str = "BF16",
    shards: int = 2,
    seed: int = 0,
    extra: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
) -> Path:
    """Write a checkpoint with `shards` files, a tokenizer and a nested file."""
    tensors: Tensors = {
        "model.embed_tokens.weight": (dtype, (11, HIDDEN)),
        "model.layers.0.self_attn.q_proj.weight": (dtype, (HIDDEN, HIDDEN)),
        "model.layers.2.mlp.shared_experts.up_proj.weight": (dtype, (INNER, HIDDEN)),
        **_expert_tensors(model_type, form, dtype),
        **(extra or {}),
    }
    directory.mkdir(parents=True)
    config = {**_BASE, **CONFIGS[model_type], "model_type": model_type}
    (directory / "config.json").write_text(json.dumps(config, indent=3))
    (directory / "tokenizer.json").write_text('{"model": "none"}')
    (directory / "assets").mkdir()
    (directory / "assets" / "note.txt").write_text("kept")
    names = sorted(tensors, key=lambda name: hashlib.sha256(name.encode()).digest())
    weight_map = {}
    for shard in range(shards):
        mine = names[shard::shards]
        file = "model.safetensors"
        if shards > 1:
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        contents = {name: _content(name, *tensors[name], seed) for name in mine}
        payload = _safetensors({name: (*tensors[name], contents[name]) for name in mine})
        (directory / file).write_bytes(payload)
        weight_map |= dict.fromkeys(mine, file)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _layout(directory: Path, seed: int = 0) -> Layout:
    """A permutation of the experts of every layer that no router group forbids, never identity."""
    fingerprint = checkpoint_fingerprint(directory)
    rng = np.random.default_rng(seed)
    rows = []
    for _ in fingerprint.layer_ids:
        inside = [rng.permutation(2) + 2 * group for group in (1, 0)]
        rows.append(np.concatenate(inside))
    return Layout(physical_to_logical_map=np.stack(rows), fingerprint=fingerprint)


def _tree(directory: Path) -> dict[str, bytes]:
    """Contents of all files, by relative name."""
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    return _write_checkpoint


@pytest.fixture(scope="session")
def make_layout() -> Callable[..., Layout]:
    return _layout


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    return _tree
