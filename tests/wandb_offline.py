"""Reads a W&B offline run back, since W&B ships no reader for the file it writes.

A `.wandb` file is a 7-byte header, then LevelDB log records in blocks of 32 KiB, each a protobuf
`Record`.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32 * 1024
_FILE_HEADER = 7
_RECORD_HEADER = struct.Struct("<IHB")  # crc32, length, type
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineRun:
    project: str
    run_id: str
    name: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    history: list[dict[str, Any]]
    config: dict[str, Any]
    axes: dict[str, str]  # metric glob -> step metric
    artifacts: list[dict[str, Any]]

    @classmethod
    def in_directory(cls, directory: Path) -> OfflineRun:
        """Read the only run below `directory`, once its last record is on disk.

        W&B's core process flushes the file shortly after `finish` has returned.
        """
        (file,) = directory.glob("wandb/offline-run-*/run-*.wandb")
        deadline = time.monotonic() + 20
        while (run := cls.read(file)) is None:
            assert time.monotonic() < deadline, f"{file} never got its exit record"
            time.sleep(0.05)
        return run

    @classmethod
    def read(cls, file: Path) -> OfflineRun | None:
        """Read a file; None when the run has not ended in it."""
        from wandb.proto import wandb_internal_pb2 as protocol

        ended = False
        fields: dict[str, Any] = {"history": [], "config": {}, "axes": {}, "artifacts": []}
        for payload in _payloads(file.read_bytes()):
            record = protocol.Record()
            record.ParseFromString(payload)
            match record.WhichOneof("record_type"):
                case "run":
                    run = record.run
                    fields |= {
                        "project": run.project,
                        "run_id": run.run_id,
                        "name": run.display_name,
                        "group": run.run_group,
                        "job_type": run.job_type,
                        "tags": tuple(run.tags),
                    }
                    fields["config"] |= _items(run.config.update)
                case "config":
                    fields["config"] |= _items(record.config.update)
                case "history":
                    fields["history"].append(_items(record.history.item))
                case "metric" if record.metric.step_metric:
                    fields["axes"][record.metric.glob_name] = record.metric.step_metric
                case "exit":
                    ended = True
                case "artifact":
                    artifact = record.artifact
                    fields["artifacts"].append(
                        {
                            "name": artifact.name,
                            "type": artifact.type,
                            "metadata": json.loads(artifact.metadata or "{}"),
                            "uploads": sorted(
                                entry.path
                                for entry in artifact.manifest.contents
                                if entry.local_path
                            ),
                        }
                    )
        return cls(**fields) if ended else None


def _items(items: Any) -> dict[str, Any]:
    return {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for item in items
        if not (item.key or item.nested_key[0]).startswith("_")
    }


def _payloads(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B", data[:4]
    position, parts = _FILE_HEADER, b""
    while position + _RECORD_HEADER.size <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _RECORD_HEADER.size:
            position += left
            continue
        _, length, kind = _RECORD_HEADER.unpack_from(data, position)
        start = position + _RECORD_HEADER.size
        chunk = data[start : start + length]
        position = start + length
        if kind == _FULL:
            yield chunk
        elif kind in (_FIRST, _MIDDLE):
            parts = chunk if kind == _FIRST else parts + chunk
        elif kind == _LAST:
            yield parts + chunk
