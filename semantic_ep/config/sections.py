"""The sections of the configuration: every field is a setting.

A description is help text, row of the reference and part of the JSON schema.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from semantic_ep.errors import ConfigError

Auto = Literal["auto"]


class Section(BaseModel):
    """A JSON object without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ObserveConfig(Section):
    """What the recorder counts, and where the profile goes."""

    output: str = Field(
        "auto", description="directory of the routing profile; auto: no recording", min_length=1
    )
    sample_tokens: NonNegativeInt = Field(
        0, description="tokens to keep as a raw trace; raw traces reveal text, 0 keeps none"
    )
    halflife_steps: Auto | PositiveInt = Field(
        "auto", description="optimizer steps after which a count weighs half; auto: no decay"
    )
    min_count: PositiveInt = Field(
        1, description="token -> expert cells seen less often than this are not stored"
    )


class PlanConfig(Section):
    """Which placement a run uses."""

    artifact: str = Field(
        "auto", description="directory of a plan; auto: contiguous placement", min_length=1
    )


class ReplanConfig(Section):
    """Whether a training run moves its experts to a new plan as routing changes."""

    interval: Auto | PositiveInt = Field(
        "auto",
        description="optimizer steps between decisions whether a new plan pays for moving the "
        "experts; auto: keep the plan, and report drift at checkpoints",
    )
    horizon_tokens: Auto | PositiveInt = Field(
        "auto", description="trained tokens in which a move must pay; auto: those of an interval"
    )


class GroupsConfig(Section):
    """Which ranks form an expert-parallel group."""

    ep_size: Auto | PositiveInt = Field(
        "auto", description="ranks in an expert-parallel group; auto: as the plan or framework says"
    )
    scope: Literal["node", "global"] = Field(
        "node",
        description="keep a group inside one node where its size allows, or ignore nodes; "
        "in Megatron only where set",
    )

    def check_divides(self, num_experts: int, *, layer: int) -> None:
        """Raise `ConfigError` if `ep_size` does not divide the experts of a layer."""
        if self.ep_size != "auto" and num_experts % self.ep_size:
            raise ConfigError(
                f"semantic_ep.groups.ep_size = {self.ep_size} does not divide num_experts = "
                f"{num_experts} (layer {layer}). Valid: "
                f"{', '.join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)}. "
                'Set "groups.ep_size" or --semantic-ep-groups-ep-size.'
            )


class DispatchConfig(Section):
    """How activations travel between ranks."""

    backend: Literal["auto", "kernels", "torch", "reference", "deepep", "kernels-emulated"] = Field(
        "auto",
        description="all-to-all backend; `semantic-ep doctor` says which ones work here. In "
        "Megatron auto leaves the exchange to --moe-token-dispatcher-type",
    )
    overlap: Literal["auto", "on", "off"] = Field(
        "auto",
        description="compute a rank's own tokens while others' travel (Hugging Face models; "
        "backends torch and kernels); auto: in calls with enough rows an expert",
    )


class ScheduleConfig(Section):
    """Which rank a token or a request runs on."""

    mode: Literal["auto", "requests", "tokens", "off"] = Field(
        "auto",
        description="schedule whole requests, single tokens, or nothing; auto: as the engine can",
    )
    predictor: Literal["auto", "table", "look-ahead"] = Field(
        "auto",
        description="what predicts the experts of single tokens: the plan's table of token ids, or "
        "each layer's own router before its attention has run; auto: look-ahead",
    )


class ServeConfig(Section):
    """How the serving engine divides its work, and what each rank of the server holds."""

    attention: Literal["dp", "tp"] = Field(
        "dp",
        description="attention of a rank: that of its own requests (dp), or that of its share of "
        "the heads for all requests (tp)",
    )
    policy: Literal["auto", "semantic", "semantic-window", "least-loaded", "round-robin"] = Field(
        "auto",
        description="which rank serves a request that arrives at the HTTP server; auto: semantic "
        "with a plan, else least-loaded",
    )
    decode_plan: str = Field(
        "auto",
        description="directory of a plan for generated tokens, which leaves the plan to those of "
        "prompts; ranks then hold the experts of both. auto: one plan for all",
        min_length=1,
    )
    kv_cache_tokens: PositiveInt = Field(
        65536, description="positions of each rank's KV cache in the HTTP server"
    )
    max_sequences: PositiveInt = Field(
        32, description="sequences that run together on a rank of the HTTP server"
    )
    prefix_cache: bool = Field(
        True,
        description="whether the HTTP server computes a beginning that prompts share once on each "
        "rank, and keeps it while there is room",
    )


class TrackingConfig(Section):
    """Where metrics go besides the JSONL file that is always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="Weights & Biases run; auto: online with a key, else offline"
    )
