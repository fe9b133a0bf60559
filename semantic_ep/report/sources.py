"""What the stages of a run left behind, read and checked.

A stage that was not run is absent, which the report says. A file that is there and makes no sense
is an error: a report must not be drawn around it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from semantic_ep.artifacts import MANIFEST, ModelFingerprint
from semantic_ep.errors import ArtifactError, explain
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.plan import Plan

Mode = Literal["contiguous", "semantic"]
MODES: tuple[Mode, ...] = ("contiguous", "semantic")
TRAIN_FILE, SERVE_FILE = "train.jsonl", "serve.json"
# What `python -m benchmarks.run serve --json` wrote here.
LOAD_FILE = "serve_benchmark.json"
PROFILE_DIR, HOLDOUT_DIR, PLAN_DIR = "profile", "holdout", "plan"
_ARTIFACTS = (PROFILE_DIR, HOLDOUT_DIR, PLAN_DIR)
TOKENIZER_FILES = ("data/tokenizer.json", "model/tokenizer.json")

# Counters, up to what a JSON number holds exactly.
Count = Annotated[int, Field(ge=0, lt=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Record(BaseModel):
    # Producers may add fields; what the report reads is checked.
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


RecordT = TypeVar("RecordT", bound=_Record)


class TrainRow(_Record):
    """One logged step of a fine-tuning run."""

    # A diverged run logs NaN, which is worth showing rather than refusing.
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=True)

    step: Count
    loss: float


class Seconds(_Record):
    """Time of the MoE layers: mean over ranks, median over rounds."""

    dispatch: NonNegativeFloat
    experts: NonNegativeFloat
    combine: NonNegativeFloat
    total: NonNegativeFloat


class ServedMode(_Record):
    """Counters of one mode; L layers, G ranks, E experts."""

    lar: list[Share]
    remote_copies: list[NonNegativeFloat]
    bytes_dispatch: list[list[Count]]
    bytes_combine: list[list[Count]]
    rank_load: list[list[Count]]
    expert_load: list[list[Count]]
    tokens_per_rank: list[Count]
    requests_per_rank: list[Count]
    seconds: Seconds
    generated_tokens: Count
    tokens_per_second: NonNegativeFloat
    expert_bytes_resident: list[Count]
    expert_bytes_total: Count

    def wire_bytes(self) -> np.ndarray:
        """[G, G] int64, dispatch and combine bytes from rank [i] to another rank [j]."""
        wire: np.ndarray = _off_diagonal(self.bytes_dispatch) + _off_diagonal(self.bytes_combine)
        return wire

    def straggler_bytes(self) -> int:
        """Bytes of the rank that sends or receives most, in dispatch plus in combine."""
        phases = (_off_diagonal(self.bytes_dispatch), _off_diagonal(self.bytes_combine))
        return sum(int(max(sent.sum(axis=0).max(), sent.sum(axis=1).max())) for sent in phases)


def _off_diagonal(matrix: list[list[int]]) -> np.ndarray:
    wire = np.array(matrix, dtype=np.int64)
    np.fill_diagonal(wire, 0)
    return wire


class IdenticalOutputs(_Record):
    """Whether the same tokens came out."""

    between_modes: bool
    to_single_process: bool
    checked_requests: Count


class ServeResult(_Record):
    """`serve.json`: what the dispatcher counted while serving the same requests in both modes."""

    ep_size: PositiveInt
    model: Annotated[ModelFingerprint, BeforeValidator(lambda data: _fingerprint(data))]
    command: list[str] = Field(default_factory=list)
    num_requests: Count
    max_new_tokens: Count
    identical_outputs: IdenticalOutputs
    modes: dict[Mode, ServedMode]

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        missing = [mode for mode in MODES if mode not in self.modes]
        if missing:
            raise ValueError(f"modes lack {', '.join(missing)}")
        layers, experts, ranks = self.model.num_layers, self.model.num_experts, self.ep_size
        expected = {
            "lar": (layers,),
            "remote_copies": (layers,),
            "bytes_dispatch": (ranks, ranks),
            "bytes_combine": (ranks, ranks),
            "rank_load": (layers, ranks),
            "expert_load": (layers, experts),
            "tokens_per_rank": (ranks,),
            "requests_per_rank": (ranks,),
            "expert_bytes_resident": (ranks,),
        }
        for mode, counters in self.modes.items():
            for name, shape in expected.items():
                found = _shape(getattr(counters, name))
                if found != shape:
                    raise ValueError(f"modes.{mode}.{name} has shape {found}, expected {shape}")
        return self


class LoadRow(_Record):
    """One plan and scheduling policy at one load; rows of other measurements have no `plan`."""

    load: str = ""
    plan: str = ""
    policy: str = ""
    requests_per_second_offered: NonNegativeFloat | None = None
    new_tokens_per_second: NonNegativeFloat
    ttft_p50_ms: NonNegativeFloat | None = None
    ttft_p99_ms: NonNegativeFloat | None = None
    tpot_p50_ms: NonNegativeFloat | None = None
    goodput: NonNegativeFloat | None = None


class LoadProtocol(_Record):
    """How it was measured, as far as the report says so."""

    source: str
    ranks: str
    baseline: str
    slo_ms: dict[str, float]


class LoadBenchmark(_Record):
    """Serving under rising load: a result of the benchmark theme `serve`."""

    theme: Literal["serve"]
    command: list[str]
    protocol: LoadProtocol
    rows: list[LoadRow]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSources:
    """Everything a report is made from.

    Attributes:
        directory: The run.
        train: Logged steps, or None when training was not run here. The same for the others.
        profile: What was observed.
        holdout: Routing of documents that were not trained on.
        plan: What was planned.
        serve: What serving counted.
        load: What serving under rising load measured.
        tokenizer: The tokenizer.json of the planned model, if it is in the run directory.
        files: Relative path -> sha256 of what was read; manifests stand for artefacts.
    """

    directory: Path
    train: tuple[TrainRow, ...] | None
    profile: RoutingProfile | None
    holdout: RoutingTrace | None
    plan: Plan | None
    serve: ServeResult | None
    load: LoadBenchmark | None
    tokenizer: Path | None
    files: dict[str, str]

    @classmethod
    def read(cls, run_dir: str | Path) -> Self:
        """Read a run directory.

        Raises:
            ArtifactError: There is nothing to report on, or a file is malformed.
            FingerprintError: Plan, profile and serving results are of different models.
        """
        directory = Path(run_dir)
        names = (TRAIN_FILE, SERVE_FILE, *(f"{name}/{MANIFEST}" for name in _ARTIFACTS))
        present = {name: directory / name for name in names if (directory / name).is_file()}
        if not present:
            raise ArtifactError(
                explain(
                    "nothing to report on here",
                    where=str(directory),
                    allowed=names,
                    do="Give the directory of a run, such as runs/quickstart",
                )
            )
        files = {name: _sha256(path) for name, path in present.items()}
        has = {name.split("/")[0] for name in present}
        profile = RoutingProfile.read(directory / PROFILE_DIR) if PROFILE_DIR in has else None
        holdout = RoutingTrace.load(directory / HOLDOUT_DIR) if HOLDOUT_DIR in has else None
        plan = Plan.read(directory / PLAN_DIR) if PLAN_DIR in has else None
        serve = _read_serve(directory / SERVE_FILE) if SERVE_FILE in has else None
        models = {
            PROFILE_DIR: profile.fingerprint if profile else None,
            HOLDOUT_DIR: holdout.fingerprint if holdout else None,
            SERVE_FILE: serve.model if serve else None,
        }
        _check_one_model(directory, plan, models)
        _check_ranks(directory, plan, serve)
        load = None
        if (directory / LOAD_FILE).is_file():
            load = _validated(
                LoadBenchmark, _text(directory / LOAD_FILE), str(directory / LOAD_FILE)
            )
            files[LOAD_FILE] = _sha256(directory / LOAD_FILE)
        tokenizer = _matching_tokenizer(directory, plan)
        if tokenizer is not None:
            files[str(tokenizer.relative_to(directory))] = _sha256(tokenizer)
        return cls(
            directory=directory,
            train=_read_train(directory / TRAIN_FILE) if TRAIN_FILE in has else None,
            profile=profile,
            holdout=holdout,
            plan=plan,
            serve=serve,
            load=load,
            tokenizer=tokenizer,
            files=files,
        )


def _read_train(path: Path) -> tuple[TrainRow, ...]:
    rows = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if line.strip():
            rows.append(_validated(TrainRow, line, f"{path}:{number}"))
    if not rows:
        raise ArtifactError(
            explain("no step was logged", where=str(path), do="Run the fine-tuning again")
        )
    return tuple(rows)


def _read_serve(path: Path) -> ServeResult:
    return _validated(ServeResult, _text(path), str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(explain(f"cannot read this file: {error}", where=str(path))) from error


def _validated(model: type[RecordT], text: str, where: str) -> RecordT:
    try:
        return model.model_validate(json.loads(text))
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in entry['loc']) or 'file'}: {entry['msg']}"
            for entry in error.errors()
        ]
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" * (len(problems) > 5))
        raise ArtifactError(
            explain("not what the stage writes", where=where, got=shown, do="Run the stage again")
        ) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            explain(f"not JSON: {error}", where=where, do="Run the stage again")
        ) from error


def _shape(value: list[Any]) -> tuple[int, ...] | str:
    rows = {len(row) for row in value if isinstance(row, list)}
    return np.shape(value) if len(rows) <= 1 else f"rows of {len(rows)} lengths"


def _fingerprint(data: Any) -> ModelFingerprint:
    try:
        fingerprint = ModelFingerprint.from_json(data)
        # Texts that are NaN would end in a report that is no JSON.
        json.dumps(dataclasses.asdict(fingerprint), allow_nan=False)
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a model fingerprint ({error})") from error
    return fingerprint


def _check_one_model(
    directory: Path, plan: Plan | None, others: Mapping[str, ModelFingerprint | None]
) -> None:
    known = {name: fingerprint for name, fingerprint in others.items() if fingerprint}
    reference = plan.fingerprint if plan else next(iter(known.values()), None)
    for name, fingerprint in known.items():
        assert reference is not None
        # A profile of a fine-tuning run predates the weights that are served.
        reference.check(fingerprint, what=str(directory / name), allow_retrained=True)


def _check_ranks(directory: Path, plan: Plan | None, serve: ServeResult | None) -> None:
    if plan and serve and plan.placement.ep_size != serve.ep_size:
        raise ArtifactError(
            explain(
                "served on another number of ranks than planned for",
                where=str(directory / SERVE_FILE),
                got=f"ep_size {serve.ep_size}",
                allowed=f"ep_size {plan.placement.ep_size}, as in {directory / PLAN_DIR}",
                do="Serve again with this plan",
            )
        )


def _matching_tokenizer(directory: Path, plan: Plan | None) -> Path | None:
    wanted = plan.fingerprint.tokenizer_sha256 if plan else ""
    for name in TOKENIZER_FILES:
        path = directory / name
        if path.is_file() and wanted in ("", _sha256(path)):
            return path
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
