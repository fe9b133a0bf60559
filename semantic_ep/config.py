"""Configuration: one field is a JSON key, a flag, a variable, a help text and a row of the docs.

The `semantic_ep` section of a DeepSpeed JSON, the `--semantic-ep-…` arguments (Megatron, DeepSpeed
and our launchers) and the `SEMANTIC_EP_…` environment variables are three spellings of the models
below. Precedence: flag, then variable, then JSON, then default. "auto" means unset. All mistakes
are reported at once, each with the place it came from.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from semantic_ep.errors import ConfigError, explain, nearest

SECTION = "semantic_ep"
FLAG_PREFIX = "--semantic-ep-"
VARIABLE_PREFIX = "SEMANTIC_EP_"

# Variables with our prefix that are no settings of a run; `environment_table` documents them too.
OTHER_VARIABLES = {
    "SEMANTIC_EP_AUTOLOAD": "frameworks whose seams are applied in an unmodified script: "
    "megatron, deepspeed, or both, comma-separated",
    "SEMANTIC_EP_API_KEY": "key that clients of the HTTP server must send",
    "SEMANTIC_EP_CACHE": "directory for compiled kernels (default: the user's cache directory)",
}

Auto = Literal["auto"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ObserveConfig(_Section):
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


class PlanConfig(_Section):
    """Which placement a run uses."""

    artifact: str = Field(
        "auto", description="directory of a plan; auto: contiguous placement", min_length=1
    )


class ReplanConfig(_Section):
    """Whether a training run moves its experts to a new plan as routing changes."""

    interval: Auto | PositiveInt = Field(
        "auto",
        description="optimizer steps between decisions whether a new plan pays for moving the "
        "experts; auto: keep the plan, and report drift at checkpoints",
    )
    horizon_tokens: Auto | PositiveInt = Field(
        "auto", description="trained tokens in which a move must pay; auto: those of an interval"
    )


class GroupsConfig(_Section):
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


class DispatchConfig(_Section):
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


class ScheduleConfig(_Section):
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


class ServeConfig(_Section):
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


class TrackingConfig(_Section):
    """Where metrics go besides the JSONL file that is always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="Weights & Biases run; auto: online with a key, else offline"
    )


class SemanticEPConfig(_Section):
    """The `semantic_ep` section."""

    enabled: bool = Field(False, description="switch semantic expert parallelism on")
    observe: ObserveConfig = ObserveConfig()
    plan: PlanConfig = PlanConfig()
    replan: ReplanConfig = ReplanConfig()
    groups: GroupsConfig = GroupsConfig()
    dispatch: DispatchConfig = DispatchConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    serve: ServeConfig = ServeConfig()
    tracking: TrackingConfig = TrackingConfig()

    @classmethod
    def from_deepspeed(cls, deepspeed_config: Mapping[str, Any]) -> Self:
        """Read the section of a DeepSpeed configuration; absent means all defaults."""
        return cls.resolve(json_section=section_of(deepspeed_config), environment={})

    @classmethod
    def resolve(
        cls,
        *,
        json_section: Mapping[str, Any] | None = None,
        args: argparse.Namespace | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """Merge flag, variable, JSON and default, in this order of precedence.

        Args:
            json_section: The value of the "semantic_ep" key, or None.
            args: A namespace filled through `add_arguments`, or None.
            environment: Variables; None means `os.environ`.

        Raises:
            ConfigError: Listing every mistake with its place, value and remedy.
        """
        environment = os.environ if environment is None else environment
        if json_section is not None and not isinstance(json_section, Mapping):
            raise ConfigError(
                explain("must be an object", where=f'JSON "{SECTION}"', got=json_section)
            )
        mistakes = _unknown_variables(environment)
        merged: dict[str, Any] = _copied(json_section or {})
        origin: dict[tuple[str, ...], str] = {}
        for setting in settings():
            for source, value in (
                (setting.variable, environment.get(setting.variable)),
                (setting.flag, getattr(args, setting.destination, None)),
            ):
                if value is not None:
                    origin[setting.path] = source
                    _assign(merged, setting.path, value)
        try:
            config = cls.model_validate(merged)
        except ValidationError as error:
            mistakes += [_describe(item, origin) for item in error.errors()]
        if mistakes:
            raise ConfigError("\n".join(dict.fromkeys(mistakes)))
        return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One leaf of the configuration in all its spellings."""

    path: tuple[str, ...]
    description: str
    default: object
    annotation: Any

    @property
    def json_path(self) -> str:
        """Dotted path from the top of the DeepSpeed JSON."""
        return ".".join((SECTION, *self.path))

    @property
    def flag(self) -> str:
        """Command-line flag."""
        return FLAG_PREFIX + "-".join(self.path).replace("_", "-")

    @property
    def destination(self) -> str:
        """Attribute of the argparse namespace."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def variable(self) -> str:
        """Environment variable."""
        return VARIABLE_PREFIX + "_".join(self.path).upper()

    @property
    def allowed(self) -> str:
        """Valid values, in words."""
        return _in_words(self.annotation)


@cache
def settings() -> tuple[Setting, ...]:
    """Every leaf of the configuration, in order of declaration."""
    return tuple(_leaves(SemanticEPConfig, ()))


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every setting as a flag; an absent flag stays None, so that other sources show through.

    Works as Megatron's `extra_args_provider`: takes the parser and returns it.
    """
    group = parser.add_argument_group("semantic expert parallelism")
    for setting in settings():
        options: dict[str, Any] = {"nargs": "?", "const": "true"} if _is_switch(setting) else {}
        group.add_argument(
            setting.flag,
            dest=setting.destination,
            metavar=setting.path[-1].upper(),
            help=f"{setting.description} ({setting.allowed}; default {setting.default})",
            **options,
        )
    return parser


def section_of(deepspeed_config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the "semantic_ep" value of a DeepSpeed configuration, or None.

    Raises:
        ConfigError: A top-level key is a near miss of the name, which DeepSpeed would ignore.
    """
    for key in deepspeed_config:
        folded = key.lower().replace("-", "_")
        if key != SECTION and (folded == SECTION or nearest(folded, [SECTION, SECTION[:-3]])):
            raise ConfigError(
                explain(
                    "this key would be ignored",
                    where=f'JSON "{key}"',
                    do=f'Write it as "{SECTION}"',
                )
            )
    return deepspeed_config.get(SECTION)


def json_schema() -> dict[str, Any]:
    """JSON schema of a DeepSpeed configuration with our section; other keys are DeepSpeed's."""
    section = SemanticEPConfig.model_json_schema()
    definitions = section.pop("$defs")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {SECTION: section},
        "$defs": definitions,
    }


def markdown_table() -> str:
    """The reference of all settings and variables as a Markdown table."""
    rows = [
        "| JSON key | flag | variable | allowed | default | meaning |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| `{s.json_path}` | `{s.flag}` | `{s.variable}` | {s.allowed} | `{s.default}` "
        f"| {s.description} |"
        for s in settings()
    ]
    rows += [f"| | | `{name}` | | | {text} |" for name, text in OTHER_VARIABLES.items()]
    return "\n".join(rows) + "\n"


def _leaves(model: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _leaves(annotation, (*prefix, name))
        else:
            yield Setting(
                path=(*prefix, name),
                description=field.description or "",
                default=field.default,
                annotation=Annotated[annotation, *field.metadata] if field.metadata else annotation,
            )


def _is_switch(setting: Setting) -> bool:
    return setting.annotation is bool


def _in_words(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return ", ".join(str(choice) for choice in typing.get_args(annotation))
    if origin is Annotated:
        base, *constraints = typing.get_args(annotation)
        bounds = [
            f"{sign} {getattr(item, name)}"
            for item in constraints
            for name, sign in (("gt", ">"), ("ge", ">="), ("le", "<="), ("lt", "<"))
            if getattr(item, name, None) is not None
        ]
        return " ".join([_in_words(base), *bounds])
    if origin is not None:
        return " or ".join(_in_words(part) for part in typing.get_args(annotation))
    names = {bool: "true, false", int: "integer", str: "text", float: "number"}
    return names.get(annotation, str(annotation))


def _copied(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copied(value) if isinstance(value, Mapping) else value
        for key, value in section.items()
    }


def _assign(tree: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    for name in path[:-1]:
        below = tree.setdefault(name, {})
        if not isinstance(below, dict):
            return  # The JSON holds a non-object here, which validation reports.
        tree = below
    tree[path[-1]] = value


def _describe(item: Any, origin: Mapping[tuple[str, ...], str]) -> str:
    """Turn one pydantic error into a message in the house form."""
    path = tuple(str(part) for part in item["loc"])
    known = {setting.path: setting for setting in settings()}
    if item["type"] == "extra_forbidden":
        siblings = {
            s.path[len(path) - 1]
            for s in known.values()
            if s.path[:-1][: len(path) - 1] == path[:-1]
        }
        near = nearest(path[-1], siblings)
        return explain(
            "unknown key",
            where=".".join((SECTION, *path)),
            allowed=sorted(siblings),
            do=f'Did you mean "{near}"?' if near else "Remove it",
        )
    # Unions report one error a branch, with the branch's name appended to the path.
    setting = next((known[path[:n]] for n in range(len(path), 0, -1) if path[:n] in known), None)
    if setting is None:
        return explain(item["msg"], where=".".join((SECTION, *path)), got=item["input"])
    return explain(
        "not a valid value",
        where=origin.get(setting.path, f'JSON "{setting.json_path}"'),
        got=item["input"],
        allowed=setting.allowed,
        do=f'Set "{setting.json_path}", {setting.flag} or {setting.variable}',
    )


def _unknown_variables(environment: Mapping[str, str]) -> list[str]:
    known = {setting.variable for setting in settings()} | set(OTHER_VARIABLES)
    mistakes = []
    for name in environment:
        if name.startswith(VARIABLE_PREFIX) and name not in known:
            near = nearest(name, known)
            mistakes.append(
                explain(
                    "unknown environment variable",
                    where=name,
                    do=f"Did you mean {near}?" if near else "Unset it",
                )
            )
    return mistakes
