"""Write tensors as a Hugging Face checkpoint's safetensors files, never holding more than one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from semantic_ep.apply.checkpoint.reader import INDEX, SINGLE


def write_shards(
    directory: Path, units: Iterable[Mapping[str, Tensor]], *, max_shard_bytes: int
) -> int:
    """Write safetensors files and, if there are several, their index.

    Args:
        directory: To write into; see `new_directory`.
        units: Tensors by name, in the order in which they go into files.
        max_shard_bytes: A new file starts before one grows beyond this.

    Returns:
        Number of tensors written.
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(pending, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for unit in units:
        for name, tensor in unit.items():
            if pending and size + tensor.nbytes > max_shard_bytes:
                flush()
                size = 0
            pending[name] = tensor.contiguous()
            size += tensor.nbytes
            total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / SINGLE)
        return len(shards[0])
    weight_map: dict[str, str] = {}
    # The name of a file tells how many there are, which is known only now.
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return len(weight_map)
