"""Convert checkpoints between Hugging Face and Megatron, one tensor or decoder layer at a time."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semantic_ep.apply.checkpoint import Checkpoint
from semantic_ep.apply.checkpoint.reader import CONFIG, read_json
from semantic_ep.apply.checkpoint.rewrite import LAYOUT_DIRECTORY
from semantic_ep.apply.checkpoint.writer import check_vacant, new_directory
from semantic_ep.apply.layout import Layout
from semantic_ep.errors import CheckpointError, explain
from semantic_ep.integrations.conversion import parameters as p
from semantic_ep.integrations.conversion.distributed_checkpoint import (
    LATEST,
    DistributedCheckpoint,
    Piece,
    write_checkpoint,
)
from semantic_ep.integrations.conversion.families import CONVERSIONS, to_huggingface, to_megatron
from semantic_ep.integrations.conversion.parameters import Heads, Rule
from semantic_ep.integrations.conversion.settings import (
    DEFAULTS,
    Arguments,
    architecture,
    differences,
    moe_pattern,
)
from semantic_ep.integrations.safetensors_shards import write_shards

logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "model.args"
_COMPANIONS = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.jinja",
               "generation_config.json")  # fmt: skip
# Megatron-LM has other defaults than launch/finetune_megatron.py.
_ALWAYS_NAMED = ("normalization", "norm_epsilon", "rotary_base")
_ENDS = (
    ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    ("decoder.final_layernorm.weight", "model.norm.weight"),
    ("output_layer.weight", "lm_head.weight"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionSummary:
    """What a conversion wrote.

    Attributes:
        output: Directory written.
        family: `model_type` of the Hugging Face model.
        tensors: Tensors written.
        left_out: Tensors of the source that the other side has no place for.
    """

    output: Path
    family: str
    tensors: int
    left_out: tuple[str, ...]


def huggingface_to_megatron(source: Path, output: Path) -> ConversionSummary:
    """Write a Hugging Face checkpoint as a distributed checkpoint of Megatron, at iteration 0.

    Experts are written in logical order: a plan that `semantic-ep apply` wrote into the source is
    undone on the way.

    Args:
        source: Directory with config.json and safetensors.
        output: Directory to make, as `--load` of Megatron takes it.

    Raises:
        CheckpointError: Megatron cannot express the model, or files are missing or in the way.
    """
    from transformers import AutoConfig

    check_vacant(output)
    reader = _HuggingFaceReader(source)
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    arguments = to_megatron(config)
    pieces, empty = _pieces(reader, arguments, CONVERSIONS[config.model_type].rules(arguments))
    recorded = {name: str(value) for name, value in arguments.items()}
    recorded["padded_vocab_size"] = str(config.vocab_size)
    with new_directory(output) as directory:
        iteration = directory / "iter_0000000"
        iteration.mkdir()
        common = {"args": recorded, "iteration": 0, "checkpoint_version": 3.0}
        write_checkpoint(iteration, pieces, empty, common)
        (directory / LATEST).write_text("0")
        (directory / ARGUMENTS_FILE).write_text(_command_line(arguments))
    left_out = tuple(sorted(reader.names - reader.used))
    return ConversionSummary(
        output=output, family=config.model_type, tensors=len(pieces), left_out=left_out
    )


def megatron_to_huggingface(
    source: Path, output: Path, *, like: Path | None = None, max_shard_bytes: int = 4 << 30
) -> ConversionSummary:
    """Write a distributed checkpoint of Megatron as a Hugging Face checkpoint.

    Args:
        source: Directory of a run's checkpoints (its latest is taken), or of one iteration.
        output: Directory to make, for `AutoModelForCausalLM.from_pretrained`.
        like: Hugging Face directory whose config.json, vocabulary size and tokenizer to keep.
        max_shard_bytes: A new file starts before one grows beyond this.

    Raises:
        CheckpointError: No family has this architecture, it is not that of `like`, or files are
            missing or in the way.
    """
    from transformers import AutoConfig

    check_vacant(output)
    checkpoint = DistributedCheckpoint(source)
    arguments = architecture(checkpoint.arguments)
    if like is None:
        config = to_huggingface(checkpoint.arguments)
        stored = checkpoint.tensor(_ENDS[0][0])
        if stored is not None:
            config.vocab_size = stored.size[0]
            config.dtype = stored.properties.dtype
        config.architectures = [_architecture(config)]
    else:
        read_json(like / CONFIG)
        config = AutoConfig.from_pretrained(like, local_files_only=True)
        expected = to_megatron(config)
        # Trained on other lengths, it is the same model.
        expected["max_position_embeddings"] = arguments["max_position_embeddings"]
        if wrong := differences(arguments, expected):
            raise CheckpointError(
                explain(
                    "the checkpoint is of another model",
                    where=f"--like {like}",
                    got="; ".join(wrong),
                )
            )
    rules = CONVERSIONS[config.model_type].rules(arguments)
    with new_directory(output) as directory:
        units = _units(checkpoint, arguments, rules, config.vocab_size)
        written = write_shards(directory, units, max_shard_bytes=max_shard_bytes)
        if like is None:
            config.save_pretrained(directory)
        else:
            _copy_companions(like, directory)
    return ConversionSummary(output=output, family=config.model_type, tensors=written, left_out=())


class _HuggingFaceReader:
    """Tensors of a Hugging Face checkpoint by name, experts by logical index."""

    def __init__(self, source: Path) -> None:
        self._checkpoint = Checkpoint.open(source)
        self.names = set(self._checkpoint.tensors)
        self.used: set[str] = set()
        self._slots: dict[int, list[int]] = {}
        self._open: dict[Path, Any] = {}
        if (source / LAYOUT_DIRECTORY).is_dir():
            layout = Layout.read(source / LAYOUT_DIRECTORY)
            rows = layout.logical_to_physical_map.tolist()
            self._slots = dict(zip(layout.fingerprint.layer_ids, rows, strict=True))
            logger.info("%s follows a plan; its experts go back to logical order", source)

    def slots(self, layer: int) -> list[int] | None:
        """Slot of each logical expert, or None for logical order."""
        return self._slots.get(layer)

    def locate(self, name: str, layer: int, expert: int | None) -> tuple[str, int | None]:
        """Tensor, and row in it, that hold a parameter of an expert."""
        slots = self.slots(layer)
        slot = expert if expert is None or slots is None else slots[expert]
        if expert is None or "{expert}" in name:
            return name.format(expert=slot), None
        return name, slot

    def meta(self, name: str, row: int | None = None) -> Tensor:
        """Shape and dtype, without data."""
        if name not in self.names:
            raise CheckpointError(
                explain(
                    f"the checkpoint lacks {name}",
                    where=str(self._checkpoint.directory),
                    do="Save the model with save_pretrained of transformers 5",
                )
            )
        self.used.add(name)
        part = self._slice(name)
        shape = part.get_shape()[0 if row is None else 1 :]
        dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                 "BF16": torch.bfloat16}.get(part.get_dtype())  # fmt: skip
        if dtype is None:
            raise CheckpointError(
                explain(
                    f"{name} is quantised",
                    where=str(self._checkpoint.directory),
                    got=part.get_dtype(),
                    allowed="F64, F32, F16, BF16",
                    do="Dequantise the model and save it in bf16 first",
                )
            )
        return torch.empty(shape, dtype=dtype, device="meta")

    def read(self, name: str, row: int | None = None) -> Tensor:
        """Read a tensor, or a row of it."""
        part = self._slice(name)
        return part[:] if row is None else part[row]

    def _slice(self, name: str) -> Any:
        from safetensors import safe_open

        file = self._checkpoint.tensors[name].file
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file].get_slice(name)


def _heads(arguments: Arguments) -> Heads:
    return Heads(query_heads=arguments["num_attention_heads"], groups=arguments["num_query_groups"])


def _applies(rule: Rule, is_moe: bool) -> bool:
    return rule.layers == p.ALL or (rule.layers == p.MOE) == is_moe


def _pieces(
    reader: _HuggingFaceReader, arguments: Arguments, rules: tuple[Rule, ...]
) -> tuple[list[Piece], list[str]]:
    """Everything to write, nothing of it read yet; and the keys of empty extra states."""
    pieces, empty = [], []
    for key, name in _ENDS:
        if key.startswith("output") and not arguments["untie_embeddings_and_output_weights"]:
            continue
        form = reader.meta(name)
        pieces.append(_piece(key, (), (), form, partial(reader.read, name)))
    # Megatron stacks the layers along an axis where all are alike.
    pattern = moe_pattern(arguments)
    stacked = all(pattern)
    for layer, is_moe in enumerate(pattern):
        prefix = "decoder.layers." if stacked else f"decoder.layers.{layer}."
        grid = ((layer, len(pattern)),) if stacked else ()
        for rule in (rule for rule in rules if _applies(rule, is_moe)):
            key = prefix + rule.megatron[0]
            experts = range(arguments["num_experts"]) if rule.experts else (None,)
            for expert in experts:
                cells = (*grid, (expert, len(experts))) if expert is not None else grid
                index, counts = tuple(c[0] for c in cells), tuple(c[1] for c in cells)
                make = _joined(reader, rule, layer, expert, _heads(arguments))
                pieces.append(_piece(key, index, counts, make(meta=True), make))
                if ".linear_" in key and key.endswith(".weight"):
                    where = cells or ((0, 1),)
                    at, of = (".".join(str(c[axis]) for c in where) for axis in (0, 1))
                    empty.append(f"{key.removesuffix('weight')}_extra_state/shard_{at}_{of}")
    return pieces, empty


def _piece(
    key: str, index: tuple[int, ...], counts: tuple[int, ...], form: Tensor, make: Any
) -> Piece:
    return Piece(
        key=key,
        size=(*counts, *form.shape),
        offset=(*index, *(0 for _ in form.shape)),
        extent=(*(1 for _ in index), *form.shape),
        dtype=form.dtype,
        make=make,
    )


def _joined(
    reader: _HuggingFaceReader, rule: Rule, layer: int, expert: int | None, heads: Heads
) -> Any:
    """A function that makes the Megatron tensor of a rule, or only its shape."""
    places = [
        reader.locate(f"model.layers.{layer}.{name}", layer, expert) for name in rule.huggingface
    ]

    def make(*, meta: bool = False) -> Tensor:
        take = reader.meta if meta else reader.read
        tensor = rule.join.forward([take(*place) for place in places], heads)
        slots = reader.slots(layer) if rule.rows and not meta else None
        return tensor if slots is None else tensor[slots]

    return make


def _units(
    checkpoint: DistributedCheckpoint, arguments: Arguments, rules: tuple[Rule, ...], vocab: int
) -> Iterator[dict[str, Tensor]]:
    """Tensors by their Hugging Face names, a decoder layer at a time."""
    for key, name in _ENDS:
        if key.startswith("output") and not arguments["untie_embeddings_and_output_weights"]:
            continue
        tensor = checkpoint.read(_stored(checkpoint, [key]))
        yield {name: tensor if "norm" in name else tensor[:vocab]}
    for layer, is_moe in enumerate(moe_pattern(arguments)):
        unit: dict[str, Tensor] = {}
        for rule in (rule for rule in rules if _applies(rule, is_moe)):
            apart = [f"decoder.layers.{layer}.{name}" for name in rule.megatron]
            key = _stored(checkpoint, apart + [f"decoder.layers.{n}" for n in rule.megatron])
            index = () if key in apart else (layer,)
            names = [f"model.layers.{layer}.{name}" for name in rule.huggingface]
            experts = range(arguments["num_experts"]) if rule.experts else (None,)
            fused: dict[str, list[Tensor]] = {}
            for expert in experts:
                cell = index if expert is None else (*index, expert)
                parts = rule.join.back(checkpoint.read(key, cell), _heads(arguments))
                for name, part in zip(names, parts, strict=True):
                    if expert is None or "{expert}" in name:
                        unit[name.format(expert=expert)] = part.contiguous()
                    else:
                        fused.setdefault(name, []).append(part)
            unit |= {name: torch.stack(parts) for name, parts in fused.items()}
        yield unit


def _stored(checkpoint: DistributedCheckpoint, keys: list[str]) -> str:
    for key in keys:
        if checkpoint.tensor(key) is not None:
            return key
    raise CheckpointError(
        explain(
            f"the checkpoint lacks {keys[0]}",
            where=str(checkpoint.directory),
            allowed=keys,
            do="Convert a checkpoint of the whole model, saved as torch_dist",
        )
    )


def _architecture(config: Any) -> str:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)


def _copy_companions(like: Path, directory: Path) -> None:
    for pattern in ("config.json", *_COMPANIONS):
        for file in like.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)


def _command_line(arguments: Arguments) -> str:
    """The arguments that are not the default, for launch/finetune_megatron.py."""
    lines = ["# The network, for launch/finetune_megatron.py; Megatron-LM's own script also needs"]
    lines.append("# --disable-bias-linear unless --add-bias-linear is below.")
    for name, value in arguments.items():
        if name in DEFAULTS and value == DEFAULTS[name] and name not in _ALWAYS_NAMED:
            continue
        if name == "num_query_groups" and not arguments["group_query_attention"]:
            continue
        flag = f"--{name.replace('_', '-')}"
        lines.append(flag if value is True else f"{flag} {str(value).replace(' ', '')}")
    return "\n".join(lines) + "\n"
