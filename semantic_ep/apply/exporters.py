"""Placements in the files of serving engines, and back.

Layers in these files are model layers where the engine counts so, else MoE layers in order; each
function says which, and which feature of the engine reads the file. Engines want every slot filled,
so a placement with empty slots is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semantic_ep.artifacts import write_file_atomically
from semantic_ep.errors import ArtifactError, PlacementError, explain
from semantic_ep.plan.placement import Placement


def write_sglang(
    placement: Placement, path: str | os.PathLike[str], *, layer_ids: Sequence[int]
) -> None:
    """Write the file of SGLang's `--init-expert-location FILE.json`.

    Needs `--ep-num-redundant-experts` equal to the placement's slots beyond E, `--ep-size` equal to
    its ranks, a model class that states its expert-location config, and, where there are replicas,
    `--ep-dispatch-algorithm static` (nearest copy) or `dynamic`. Without `--enable-eplb` the
    placement stays as it is.

    Args:
        placement: L MoE layers.
        path: A file ending in .json; SGLang tells formats apart by the ending.
        layer_ids: [L] model layer of each MoE layer. SGLang counts all model layers; rows of dense
            layers are there, in rising order, and are never used.

    Raises:
        PlacementError: A slot is empty.
    """
    slots = _filled(placement, "SGLang")
    _check_layer_ids(placement, layer_ids)
    if Path(path).suffix != ".json":
        raise PlacementError(
            explain("SGLang reads this file only if it ends in .json", where=str(path))
        )
    experts = placement.num_experts
    # A dense layer's row must be a valid map too: SGLang checks nothing but its shape.
    table = np.tile(np.arange(slots.shape[1]) % experts, (max(layer_ids) + 1, 1))
    table[list(layer_ids)] = slots
    _write(path, {"physical_to_logical_map": table.tolist()})


def read_sglang(
    path: str | os.PathLike[str], *, layer_ids: Sequence[int], num_experts: int, ep_size: int
) -> Placement:
    """Inverse of `write_sglang`."""
    table = np.asarray(_read(path, "physical_to_logical_map"))
    return Placement(
        physical_to_logical_map=table[list(layer_ids)], num_experts=num_experts, ep_size=ep_size
    )


def write_vllm(placement: Placement, path: str | os.PathLike[str]) -> None:
    """Write a JSON list of each MoE layer's physical -> logical map.

    vLLM's released versions choose the first placement themselves (`--enable-eplb`, linear or
    round-robin `--expert-placement-strategy`) and read no file. The format is that of
    `--eplb-config.initial_expert_map_path`, proposed upstream (pull request 49572), which takes one
    list a MoE layer and rearranges weights after loading. It needs `--enable-expert-parallel`,
    `--enable-eplb` and `num_redundant_experts` equal to the slots beyond E. For a vLLM without it,
    apply the placement to the checkpoint (`semantic-ep apply`), which has no replicas.

    Raises:
        PlacementError: A slot is empty.
    """
    _write(path, _filled(placement, "vLLM").tolist())


def read_vllm(path: str | os.PathLike[str], *, num_experts: int, ep_size: int) -> Placement:
    """Inverse of `write_vllm`."""
    return Placement(
        physical_to_logical_map=np.asarray(_read(path)), num_experts=num_experts, ep_size=ep_size
    )


def write_vllm_ascend(placement: Placement, path: str | os.PathLike[str]) -> None:
    """Write the static expert map of vLLM-Ascend (`expert_map_path` in `--additional-config`).

    Layers are MoE layers in order, devices are EP ranks. The number of redundant experts is taken
    from the file. Needs `--enable-expert-parallel`.

    Raises:
        PlacementError: A slot is empty.
    """
    slots = _filled(placement, "vLLM-Ascend").reshape(placement.num_layers, placement.ep_size, -1)
    layers = [
        {
            "layer_id": layer,
            "device_count": placement.ep_size,
            "device_list": [
                {"device_id": device, "device_expert": held.tolist()}
                for device, held in enumerate(row)
            ],
        }
        for layer, row in enumerate(slots)
    ]
    _write(path, {"moe_layer_count": placement.num_layers, "layer_list": layers})


def read_vllm_ascend(path: str | os.PathLike[str], *, num_experts: int) -> Placement:
    """Inverse of `write_vllm_ascend`."""
    layers = sorted(_read(path, "layer_list"), key=lambda layer: int(layer["layer_id"]))
    rows = [
        [
            expert
            for device in sorted(layer["device_list"], key=lambda held: int(held["device_id"]))
            for expert in device["device_expert"]
        ]
        for layer in layers
    ]
    return Placement(
        physical_to_logical_map=np.asarray(rows),
        num_experts=num_experts,
        ep_size=int(layers[0]["device_count"]),
    )


def write_tensorrt_llm(
    placement: Placement,
    path: str | os.PathLike[str],
    *,
    layer_ids: Sequence[int],
    layer_updates_per_iter: int = 0,
) -> None:
    """Write the YAML that TensorRT-LLM's `moe_config.load_balancer` names.

    Needs the PyTorch backend with a MoE backend that balances (`moe_config.backend: WIDEEP` up to
    release 1.2; 1.3 has dropped that name) and `moe_expert_parallel_size` equal to the placement's
    ranks. Layers are model layers.

    Args:
        placement: L MoE layers.
        path: File to write.
        layer_ids: [L] model layer of each MoE layer.
        layer_updates_per_iter: 0 keeps the placement (offline balancing); more lets the engine
            re-balance that many layers an iteration from its own counts.

    Raises:
        PlacementError: A slot is empty.
    """
    slots = _filled(placement, "TensorRT-LLM")
    _check_layer_ids(placement, layer_ids)
    lines = [
        f"num_slots: {slots.shape[1]}",
        f"layer_updates_per_iter: {layer_updates_per_iter}",
        "initial_global_assignments:",
        *(f"  {layer}: {json.dumps(row.tolist())}" for layer, row in zip(layer_ids, slots)),
    ]
    _write_text(path, "\n".join(lines) + "\n")


def read_tensorrt_llm(
    path: str | os.PathLike[str], *, num_experts: int, ep_size: int
) -> tuple[Placement, tuple[int, ...]]:
    """Inverse of `write_tensorrt_llm`: (placement, model layer of each MoE layer).

    Reads the subset of YAML that it and TensorRT-LLM's own generator write: a mapping of layer to
    a list in brackets, one a line.
    """
    assignments: dict[int, list[int]] = {}
    inside = False
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, value = line.partition(":")
        if not line.startswith(" "):
            inside = name == "initial_global_assignments"
            continue
        if inside:
            try:
                assignments[int(name)] = [int(expert) for expert in json.loads(value)]
            except (ValueError, TypeError) as error:
                raise ArtifactError(
                    explain(
                        f"not a layer's assignment: {error}",
                        where=f"{path}:{number}",
                        allowed="LAYER: [expert, expert, ...]",
                    )
                ) from error
    if not assignments:
        raise ArtifactError(explain("no initial_global_assignments here", where=str(path)))
    layers = sorted(assignments)
    placement = Placement(
        physical_to_logical_map=np.asarray([assignments[layer] for layer in layers]),
        num_experts=num_experts,
        ep_size=ep_size,
    )
    return placement, tuple(layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """A serving engine that takes a placement from a file.

    Attributes:
        write: Writes (placement, path, model layer of each MoE layer).
        needs: What the engine must be started with to use the file of (placement, path).
    """

    write: Callable[[Placement, Path, Sequence[int]], None]
    needs: Callable[[Placement, Path], tuple[str, ...]]


def _redundant(placement: Placement) -> int:
    return placement.ep_size * placement.slots_per_rank - placement.num_experts


def _needs_sglang(placement: Placement, path: Path) -> tuple[str, ...]:
    needs = [
        f"--init-expert-location {path}",
        f"--ep-size {placement.ep_size}",
        f"--ep-num-redundant-experts {_redundant(placement)}",
        "a model class with an expert-location config",
        "no --enable-eplb, which would replace the placement",
    ]
    if placement.has_replicas:
        needs.append("--ep-dispatch-algorithm static (nearest copy) or dynamic")
    return tuple(needs)


def _needs_vllm(placement: Placement, path: Path) -> tuple[str, ...]:
    return (
        "a vLLM that reads eplb_config.initial_expert_map_path (proposed in vllm-project/vllm "
        "pull request 49572; without it, use `semantic-ep apply`)",
        "--enable-expert-parallel --enable-eplb",
        f"{placement.ep_size} EP ranks",
        f"--eplb-config.initial_expert_map_path {path}",
        f"--eplb-config.num_redundant_experts {_redundant(placement)}",
    )


def _needs_vllm_ascend(placement: Placement, path: Path) -> tuple[str, ...]:
    return (
        "--enable-expert-parallel",
        f"{placement.ep_size} EP ranks",
        f"--additional-config '{json.dumps({'expert_map_path': str(path)})}'",
    )


def _needs_tensorrt_llm(placement: Placement, path: Path) -> tuple[str, ...]:
    return (
        "the PyTorch backend",
        "a moe_config.backend that takes a load balancer: WIDEEP up to TensorRT-LLM 1.2",
        f"moe_config.load_balancer: {path}",
        f"moe_expert_parallel_size: {placement.ep_size}",
    )


ENGINES: Mapping[str, Engine] = {
    "sglang": Engine(
        write=lambda placement, path, layer_ids: write_sglang(placement, path, layer_ids=layer_ids),
        needs=_needs_sglang,
    ),
    "vllm": Engine(
        write=lambda placement, path, layer_ids: write_vllm(placement, path), needs=_needs_vllm
    ),
    "vllm-ascend": Engine(
        write=lambda placement, path, layer_ids: write_vllm_ascend(placement, path),
        needs=_needs_vllm_ascend,
    ),
    "tensorrt-llm": Engine(
        write=lambda placement, path, layer_ids: write_tensorrt_llm(
            placement, path, layer_ids=layer_ids
        ),
        needs=_needs_tensorrt_llm,
    ),
}


def _filled(placement: Placement, engine: str) -> np.ndarray:
    """[L, G * S] slots, none of them empty."""
    if (placement.physical_to_logical_map < 0).any():
        raise PlacementError(
            explain(
                f"{engine} wants an expert in every slot, and this placement leaves some empty",
                do="Plan with as many experts on each rank, or with spare slots that divide evenly",
            )
        )
    return placement.physical_to_logical_map


def _check_layer_ids(placement: Placement, layer_ids: Sequence[int]) -> None:
    if len(layer_ids) != placement.num_layers or sorted(set(layer_ids)) != list(layer_ids):
        raise PlacementError(
            explain(
                "layer_ids must name the model layer of each MoE layer, in rising order",
                got=f"{list(layer_ids)} for {placement.num_layers} MoE layers",
            )
        )


def _write(path: str | os.PathLike[str], data: Any) -> None:
    _write_text(path, json.dumps(data))


def _write_text(path: str | os.PathLike[str], text: str) -> None:
    try:
        write_file_atomically(Path(path), text.encode())
    except OSError as error:
        raise ArtifactError(
            explain(
                f"cannot be written: {error.strerror}",
                where=str(path),
                do="Give a file in a directory that exists and is writable",
            )
        ) from error


def _text(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise ArtifactError(
            explain(f"cannot be read: {error.strerror}", where=str(path), do="Check the path")
        ) from error


def _read(path: str | os.PathLike[str], key: str | None = None) -> Any:
    try:
        data = json.loads(_text(path))
        return data if key is None else data[key]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            explain(
                f"not the expected file: {type(error).__name__} {error}",
                where=str(path),
                allowed="a JSON list" if key is None else f'a JSON object with "{key}"',
            )
        ) from error
