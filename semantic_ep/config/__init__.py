"""Configuration: one field is a JSON key, a flag, a variable, a help text and a row of the docs.

The `semantic_ep` section of a DeepSpeed JSON, the `--semantic-ep-…` arguments (Megatron, DeepSpeed
and our launchers) and the `SEMANTIC_EP_…` environment variables are three spellings of the models
of `sections`. Precedence: flag, then variable, then JSON, then default. "auto" means unset. All
mistakes are reported at once, each with the place it came from.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError

from semantic_ep.config.sections import (
    DispatchConfig,
    GroupsConfig,
    ObserveConfig,
    PlanConfig,
    ReplanConfig,
    ScheduleConfig,
    Section,
    ServeConfig,
    TrackingConfig,
)
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


class SemanticEPConfig(Section):
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
