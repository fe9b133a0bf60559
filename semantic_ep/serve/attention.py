"""What a run's settings say about attention and the schedule of single tokens."""

from __future__ import annotations

from typing import Any

from semantic_ep.config import SemanticEPConfig
from semantic_ep.errors import ConfigError, explain
from semantic_ep.plan.schedule import Schedule
from semantic_ep.plan.token_schedule import SchedulePredictor

_ATTENTION = "semantic_ep.serve.attention, --semantic-ep-serve-attention"
_MODE = "semantic_ep.schedule.mode, --semantic-ep-schedule-mode"
_PREDICTOR = "semantic_ep.schedule.predictor, --semantic-ep-schedule-predictor"


def attention_options(
    settings: SemanticEPConfig,
    schedule: Schedule | None,
    decode_schedule: Schedule | None = None,
) -> dict[str, Any]:
    """Options of `SemanticInferenceEngine.from_checkpoint` that the settings ask for.

    Args:
        settings: Of the run.
        schedule: Of the plan that the experts are placed by; None serves without affinity.
        decode_schedule: Of the plan for generated tokens, if they have one of their own.

    Raises:
        ConfigError: The settings contradict each other.
    """
    mode, predictor = settings.schedule.mode, settings.schedule.predictor
    if settings.serve.attention == "dp":
        if mode == "tokens" or predictor != "auto":
            raise ConfigError(
                explain(
                    "attention-DP serves requests whole; single tokens cannot be scheduled",
                    where=_MODE if mode == "tokens" else _PREDICTOR,
                    got=mode if mode == "tokens" else predictor,
                    allowed=["auto", "requests", "off"] if mode == "tokens" else ["auto"],
                    do=f'Or set {_ATTENTION} to "tp"',
                )
            )
        return {"attention": "dp"}
    if mode == "requests":
        raise ConfigError(
            explain(
                "in attention-TP all ranks serve every request; there is no rank to choose",
                where=_MODE,
                got=mode,
                allowed=["auto", "tokens", "off"],
                do=f'Or set {_ATTENTION} to "dp"',
            )
        )
    if mode == "off" or schedule is None:
        return {"attention": "tp", "predictor": None}
    if predictor == "table":
        options = {"attention": "tp", "predictor": SchedulePredictor(schedule=schedule)}
        if decode_schedule is not None:
            options["decode_predictor"] = SchedulePredictor(schedule=decode_schedule)
        return options
    return {"attention": "tp", "predictor": "look-ahead"}
