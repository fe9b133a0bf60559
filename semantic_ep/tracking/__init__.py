"""Tracking: the one way in which training, planning, serving and benchmarks record numbers.

Every run directory gets `metrics.jsonl`, always. The same numbers go to Weights & Biases when it is
installed: online when a key and the network are there, to an offline run otherwise, which
`wandb sync` uploads later. Nothing here ever prompts, and nothing waits for a network that is
not there. Project, name, group, tags and entity come from the usual `WANDB_*` variables.

A step belongs to a part of the pipeline: each prefix (`train/`, `routing/`, ...) has its own axis,
`<prefix>/step`, because training steps, planning iterations and serving rounds are different
clocks. W&B's global step is left to whoever owns the run: Megatron and DeepSpeed use it.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from semantic_ep.artifacts import KINDS, installed_versions, read_artifact
from semantic_ep.errors import ArtifactError, ConfigError, explain, nearest
from semantic_ep.tracking.wandb_run import (
    PREFIXES,
    WandbSetting,
    as_artifact,
    open_run,
    resolve_mode,
)

__all__ = ["METRICS_FILE", "PREFIXES", "ArtifactRole", "Tracker", "WandbSetting"]

METRICS_FILE = "metrics.jsonl"
ArtifactRole = Literal["output", "input"]


class Tracker:
    """Records metrics, artefacts, tables and images of one run. Make it with `Tracker.start`.

    On ranks other than the writer every method returns at once, so callers need no rank checks.
    """

    def __init__(
        self, *, run_dir: Path, job_type: str, jsonl: Any | None, wandb_run: Any | None, owned: bool
    ) -> None:
        self.run_dir = run_dir
        self._job_type = job_type
        self._jsonl = jsonl
        self._wandb_run = wandb_run
        self._owns_wandb_run = owned

    @classmethod
    def start(
        cls,
        run_dir: str | os.PathLike[str],
        *,
        config: Mapping[str, Any] | None = None,
        job_type: str,
        wandb: WandbSetting = "auto",
        rank: int = 0,
        writer_rank: int = 0,
    ) -> Self:
        """Open the records of a run.

        Args:
            run_dir: Directory of the run; `metrics.jsonl` is appended to, so that a resumed run
                keeps its history.
            config: The full resolved configuration, JSON-serialisable.
            job_type: What this process does: "train", "plan", "serve", "report" or "benchmark".
            wandb: "auto" decides by `WANDB_MODE`, key and network; "offline" and "disabled" say
                so; "online" fails where "auto" would fall back.
            rank: Rank of this process.
            writer_rank: The one rank that records. Megatron opens W&B on its last rank.

        Raises:
            ConfigError: `wandb` or `WANDB_MODE` is unknown, or "online" was asked for in vain.
            BackendError: W&B was asked for by name and is not installed.
            ArtifactError: `run_dir` cannot be written.
        """
        mode = resolve_mode(wandb)
        directory = Path(run_dir)
        if rank != writer_rank:
            return cls(
                run_dir=directory, job_type=job_type, jsonl=None, wandb_run=None, owned=False
            )
        resolved = json.loads(json.dumps(dict(config or {}), default=_jsonable))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            jsonl = open(directory / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ArtifactError(
                explain(
                    f"cannot record metrics here: {error.strerror or error}",
                    where=str(directory / METRICS_FILE),
                    do="Choose a writable run directory",
                )
            ) from error
        try:
            run, owned = open_run(mode, wandb, directory, resolved, job_type)
        except BaseException:
            jsonl.close()
            raise
        tracker = cls(run_dir=directory, job_type=job_type, jsonl=jsonl, wandb_run=run, owned=owned)
        tracker._event("start", config=resolved, versions=installed_versions())
        return tracker

    @property
    def active(self) -> bool:
        """Whether this rank records."""
        return self._jsonl is not None

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record numbers.

        Args:
            metrics: `<prefix>/<name>` -> number (Python, numpy or a one-element tensor). Nested
                mappings are joined with "/". Prefixes are those of `PREFIXES`.
            step: Position on the axis of the prefixes that occur in `metrics`.

        Raises:
            ConfigError: A name has no known prefix, or a value is no number.
        """
        if self._jsonl is None:
            return
        values = _flatten(metrics)
        prefixes = sorted({_checked_prefix(name) for name in values})
        if step is not None:
            values |= {f"{prefix}/step": step for prefix in prefixes}
        self._write({"time": time.time(), "job_type": self._job_type, **values})
        if self._wandb_run is not None:
            # In a run that belongs to a framework, rows are committed by its own logging, at its
            # own step; committing ours would advance W&B's step past the framework's.
            self._wandb_run.log(values, commit=self._owns_wandb_run)

    def log_artifact(
        self,
        path: str | os.PathLike[str],
        kind: str,
        *,
        role: ArtifactRole = "output",
    ) -> None:
        """Record that this run made (or, with `role="input"`, used) an artefact.

        Lineage is the chain of manifest checksums: each artefact's `sha256` and `parents` go to
        the JSONL and to W&B metadata. Online, W&B's own graph is built from the same calls.

        Args:
            path: Directory of an artefact, or any file or directory, such as a checkpoint.
            kind: An artefact kind (trace, profile, plan, layout), or "checkpoint", "report", ...
            role: Whether the run wrote it or read it.

        Raises:
            ArtifactError: There is nothing at `path`, or it holds another kind.
        """
        if self._jsonl is None:
            return
        target = Path(path)
        identity = _identity(target, kind)
        self._event("artifact", role=role, artifact_kind=kind, path=str(target), **identity)
        run = self._wandb_run
        if run is None:
            return
        summary = {"kind": kind, "path": str(target), **identity}
        run.config.update(
            {f"{role}s": {**dict(run.config).get(f"{role}s", {}), kind: summary}},
            allow_val_change=True,
        )
        if role == "output":
            run.log_artifact(as_artifact(target, kind, identity))
        elif not run.offline:
            run.use_artifact(as_artifact(target, kind, identity))

    def log_image(self, name: str, path: str | os.PathLike[str]) -> None:
        """Record a picture under `<prefix>/<name>`.

        Raises:
            ConfigError: The name has no known prefix.
            ArtifactError: There is no file at `path`.
        """
        if self._jsonl is None:
            return
        _checked_prefix(name)
        file = Path(path)
        if not file.is_file():
            raise ArtifactError(explain("no picture here", where=str(file)))
        self._event("image", name=name, path=str(file))
        if self._wandb_run is not None:
            import wandb

            image = wandb.Image(str(file))
            self._wandb_run.log({name: image}, commit=self._owns_wandb_run)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a table under `<prefix>/<name>`.

        Args:
            name: See there.
            rows: Their keys together are the columns. W&B takes one type a column: where numbers
                and texts meet, it gets texts.

        Raises:
            ConfigError: The name has no known prefix, or there is no row.
        """
        if self._jsonl is None:
            return
        _checked_prefix(name)
        if not rows:
            raise ConfigError(explain("a table needs a row", where=name))
        columns = list(dict.fromkeys(column for row in rows for column in row))
        data = [[row.get(column) for column in columns] for row in rows]
        self._event("table", name=name, columns=columns, rows=data)
        if self._wandb_run is not None:
            import wandb

            table = wandb.Table(columns=columns, data=_one_type_a_column(data))
            self._wandb_run.log({name: table}, commit=self._owns_wandb_run)

    def finish(self, *, exit_code: int = 0) -> None:
        """Close the records. A W&B run that was open before stays open."""
        if self._jsonl is None:
            return
        self._event("finish", exit_code=exit_code)
        self._jsonl.close()
        self._jsonl = None
        if self._wandb_run is not None and self._owns_wandb_run:
            self._wandb_run.finish(exit_code=exit_code)
        self._wandb_run = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.finish(exit_code=0 if kind is None else 1)

    def _event(self, event: str, **fields: Any) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._write({"event": event, "job_type": self._job_type, "at": now, **fields})

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._jsonl is not None
        self._jsonl.write(json.dumps(_finite(row), allow_nan=False) + "\n")
        self._jsonl.flush()


def _checked_prefix(name: str) -> str:
    prefix, separator, rest = name.partition("/")
    if not separator or not rest or prefix not in PREFIXES:
        close = nearest(prefix, PREFIXES)
        raise ConfigError(
            explain(
                "a metric is named <prefix>/<name>",
                got=name,
                allowed=tuple(f"{known}/" for known in PREFIXES),
                do=f'Did you mean "{close}/{rest or name}"?' if close else None,
            )
        )
    return prefix


def _flatten(metrics: Mapping[str, Any], parent: str = "") -> dict[str, float | int]:
    flat: dict[str, float | int] = {}
    for key, value in metrics.items():
        name = f"{parent}{key}"
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{name}/")
            continue
        number = value
        if not isinstance(value, bool | int | float):
            with suppress(AttributeError, ValueError, TypeError, RuntimeError):
                number = value.item()
        if not isinstance(number, bool | int | float):
            raise ConfigError(
                explain(
                    f"{name} is no number",
                    got=type(value).__name__,
                    do="Log one number a name, e.g. one a layer or a rank",
                )
            )
        flat[name] = number
    return flat


def _one_type_a_column(data: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Rows as W&B's tables take them: columns of numbers, of truths, or of texts, with gaps."""
    columns = []
    for cells in zip(*data, strict=True):
        kinds = {
            bool if isinstance(cell, bool) else float if isinstance(cell, int | float) else str
            for cell in cells
            if cell is not None
        }
        plain = len(kinds) <= 1 and str not in kinds
        columns.append([cell if cell is None or plain else str(cell) for cell in cells])
    return [list(row) for row in zip(*columns, strict=True)]


def _finite(value: Any) -> Any:
    """Spell NaN and infinities as strings: JSON has no such numbers, and losing them would lie."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _jsonable(value: Any) -> Any:
    for method in ("model_dump", "tolist"):
        if hasattr(value, method):
            return getattr(value, method)()
    return str(value)


def _identity(target: Path, kind: str) -> dict[str, Any]:
    """What is known of an artefact without reading its arrays: checksum, parents, model."""
    if not target.exists():
        raise ArtifactError(explain(f"no {kind} here", where=str(target)))
    if kind not in KINDS:
        return {}
    artifact = read_artifact(target, kind=kind)
    fingerprint = artifact.fingerprint
    return {
        "sha256": artifact.sha256,
        "parents": dict(artifact.parents),
        "architecture": fingerprint.architecture,
        "router_sha256": fingerprint.router_sha256,
    }
