"""Seams: the few places where upstream code must behave otherwise, each named, probed, revertible.

A seam replaces one attribute of one upstream object by a short wrapper that still calls the
original, which stays reachable as `__wrapped__`. Construction and subclassing come first; a seam
is for what they cannot reach. Nothing is applied by importing this package.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet

from semantic_ep.errors import BackendError, ConfigError, explain, nearest

logger = logging.getLogger(__name__)

GROUPS = {
    "megatron": "semantic_ep.patches.megatron",
    "deepspeed": "semantic_ep.patches.deepspeed",
}
ABSENT = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seam:
    """One replaced attribute of upstream code.

    Attributes:
        name: Unique, dotted, starting with the group: "megatron.cpu.current_device".
        package: Distribution whose version decides, e.g. "megatron-core".
        versions: Range of that version in which the seam was tested (PEP 440 specifier).
        target: "module:attribute.path" of what is replaced.
        parameters: Names of the target's parameters, which a probe compares with the installed
            ones; None where the target has no signature (C functions, plain values).
        why: What goes wrong without it.
        remove_when: The upstream change that makes it superfluous.
        wrap: Takes the original and returns its replacement, at most 40 lines long.
        may_be_absent: The target may be missing, and `wrap` then gets `ABSENT`.
        inactive: Returns why the seam is not needed on this machine, or None where it is.
    """

    name: str
    package: str
    versions: str
    target: str
    parameters: tuple[str, ...] | None
    why: str
    remove_when: str
    wrap: Callable[[Any], Any]
    may_be_absent: bool = False
    inactive: Callable[[], str | None] = lambda: None

    @property
    def group(self) -> str:
        """Framework that the seam belongs to."""
        return self.name.split(".", 1)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeamStatus:
    """What a check found out about one seam.

    Attributes:
        seam: The seam.
        state: "applied", "ready", "inactive" (not needed here), "not installed", "version" (out of
            range) or "probe" (the target is not what the seam was written for).
        detail: One sentence for a person, "" when there is nothing to say.
        found: Parameter names of the installed target; None where it has none.
    """

    seam: Seam
    state: str
    detail: str = ""
    found: tuple[str, ...] | None = None

    @property
    def failed(self) -> bool:
        """Whether the seam could not be applied although it is wanted here."""
        return self.state in ("version", "probe", "not installed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Applied:
    owner: Any
    attribute: str
    original: Any  # as found in the owner's own namespace, ABSENT if inherited or missing


_applied: dict[str, _Applied] = {}


def seams(group: str | None = None) -> tuple[Seam, ...]:
    """All registered seams, or those of one group.

    Raises:
        ConfigError: There is no such group.
    """
    if group is not None and group not in GROUPS:
        near = nearest(group, GROUPS)
        raise ConfigError(
            explain(
                "there are no seams of this name",
                got=group,
                allowed=sorted(GROUPS),
                do=f"Did you mean {near!r}?" if near else None,
            )
        )
    names = [group] if group else list(GROUPS)
    return tuple(seam for name in names for seam in importlib.import_module(GROUPS[name]).SEAMS)


def apply(group: str, *, allow_untested_version: bool = False) -> tuple[str, ...]:
    """Apply every seam of a group that this machine needs: all of them, or none.

    Applying twice changes nothing.

    Args:
        group: "megatron" or "deepspeed".
        allow_untested_version: Go on although the installed version is outside a seam's range. A
            failed probe is an error all the same.

    Returns:
        Names of the seams that are now applied.

    Raises:
        BackendError: A seam fits neither the installed version nor its signature; nothing changed.
    """
    tolerated = {"version"} if allow_untested_version else set()
    statuses = [check(seam) for seam in seams(group)]
    failures = [s for s in statuses if s.failed and s.state not in tolerated]
    if failures:
        raise BackendError(
            "\n".join(
                explain(f"seam {s.seam.name} cannot be applied: {s.detail}", where=s.seam.target)
                for s in failures
            )
        )
    newly: list[str] = []
    try:
        for status in statuses:
            if status.state in ("ready", *tolerated):
                _replace(status.seam)
                newly.append(status.seam.name)
    except BaseException:
        for name in reversed(newly):
            _restore(name)
        raise
    if newly:
        logger.info("applied %d seams of %s: %s", len(newly), group, ", ".join(newly))
    return tuple(seam.name for seam in seams(group) if seam.name in _applied)


def revert(group: str) -> None:
    """Put every original of a group back, in reverse order."""
    for seam in reversed(seams(group)):
        if seam.name in _applied:
            _restore(seam.name)


def check(seam: Seam) -> SeamStatus:
    """Compare one seam with what is installed; imports the target, changes nothing."""
    if seam.name in _applied:
        return SeamStatus(seam=seam, state="applied")
    try:
        version = metadata.version(seam.package)
    except metadata.PackageNotFoundError:
        return SeamStatus(
            seam=seam, state="not installed", detail=f"{seam.package} is not installed"
        )
    reason = seam.inactive()
    if reason is not None:
        return SeamStatus(seam=seam, state="inactive", detail=reason)
    try:
        owner, attribute = resolve(seam.target)
        original = getattr(owner, attribute, ABSENT)
    except (ImportError, AttributeError) as error:
        return SeamStatus(seam=seam, state="probe", detail=f"cannot be found: {error}")
    found = parameter_names(original)
    problem = mismatch(seam, present=original is not ABSENT, found=found)
    if problem is not None:
        return SeamStatus(seam=seam, state="probe", detail=problem, found=found)
    if not SpecifierSet(seam.versions).contains(version, prereleases=True):
        return SeamStatus(
            seam=seam,
            state="version",
            detail=f"{seam.package} {version} is installed, the seam was tested with "
            f"{seam.versions}; pass allow_untested_version=True to try",
            found=found,
        )
    return SeamStatus(seam=seam, state="ready", found=found)


def mismatch(seam: Seam, *, present: bool, found: tuple[str, ...] | None) -> str | None:
    """Say how a target differs from what the seam was written for, or return None."""
    if not present:
        return None if seam.may_be_absent else "the attribute does not exist any more"
    if seam.parameters is not None and found != seam.parameters:
        return f"its parameters are {found}, the seam was written for {seam.parameters}"
    return None


def resolve(target: str) -> tuple[Any, str]:
    """Import the owner of a target: ("module:a.b") -> (object module.a, "b")."""
    module, path = target.split(":")
    *owners, attribute = path.split(".")
    owner: Any = importlib.import_module(module)
    for name in owners:
        owner = getattr(owner, name)
    return owner, attribute


def parameter_names(target: Any) -> tuple[str, ...] | None:
    """Parameter names of a function or class; None for what has no signature."""
    if not callable(target):
        return None
    try:
        return tuple(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None


def markdown_table(chosen: Sequence[Seam]) -> str:
    """The seams as a Markdown table."""
    lines = [
        "| seam | replaces | versions | why | remove when |",
        "|---|---|---|---|---|",
    ]
    for seam in chosen:
        signature = "" if seam.parameters is None else f"({', '.join(seam.parameters)})"
        lines.append(
            f"| `{seam.name}` | `{seam.target}{signature}` | {seam.package} {seam.versions} "
            f"| {seam.why} | {seam.remove_when} |"
        )
    return "\n".join(lines) + "\n"


def _replace(seam: Seam) -> None:
    owner, attribute = resolve(seam.target)
    own = vars(owner).get(attribute, ABSENT)
    original = getattr(owner, attribute, ABSENT)
    replacement = seam.wrap(original)
    if callable(original) and callable(replacement):
        replacement.__wrapped__ = original
    setattr(owner, attribute, replacement)
    _applied[seam.name] = _Applied(owner=owner, attribute=attribute, original=own)


def _restore(name: str) -> None:
    record = _applied.pop(name)
    if record.original is ABSENT:
        delattr(record.owner, record.attribute)
    else:
        setattr(record.owner, record.attribute, record.original)
