"""Combine the counters of the ranks of a group, part by part."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from semantic_ep.observe.counters import RoutingCounters
from semantic_ep.observe.samples import Part


def reduce_to_first(
    name: str, part: Part, counters: RoutingCounters, group: dist.ProcessGroup | None
) -> Part | None:
    """Combine a part over a binary tree of ranks; the sum ends on the first rank."""
    if group is None:
        return part
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    distance = 1
    while distance < size:
        if rank % (2 * distance):
            send_part(part, dist.get_global_rank(group, rank - distance), group)
            return None
        if rank + distance < size:
            source = dist.get_global_rank(group, rank + distance)
            part = counters.combine(name, part, receive_part(source, group))
        distance *= 2
    return part


def send_part(part: Part, destination: int, group: dist.ProcessGroup) -> None:
    """Send a part to a rank of the job that calls `receive_part`; on the host."""
    header = [{key: (array.shape, array.dtype.str) for key, array in part.items()}]
    dist.send_object_list(header, dst=destination, group=group)
    for array in part.values():
        if array.size:
            data = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            dist.send(data, dst=destination, group=group)


def receive_part(source: int, group: dist.ProcessGroup) -> Part:
    """A part from a rank of the job that calls `send_part`."""
    header: list[Any] = [None]
    dist.recv_object_list(header, src=source, group=group)
    part: Part = {}
    for key, (shape, dtype) in header[0].items():
        array = np.empty(shape, np.dtype(dtype))
        if array.size:
            dist.recv(torch.from_numpy(array.reshape(-1).view(np.uint8)), src=source, group=group)
        part[key] = array
    return part
