"""`semantic-ep doctor`: what is installed, what works here, and why the rest does not."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import logging
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata

SYMBOLS = {"ok": "[green]ok[/]", "no": "[yellow]no[/]", "wrong": "[red]wrong[/]"}

# What each distribution is for; version ranges come from this package's own metadata.
PURPOSE = {
    "numpy": "planning",
    "scipy": "planning",
    "pydantic": "configuration",
    "safetensors": "artefacts and checkpoints",
    "torch": "dispatch, training, serving",
    "deepspeed": "fine-tuning (AutoEP, deepspeed.moe) and serving",
    "megatron-core": "fine-tuning",
    "transformers": "model families, serving",
    "fastapi": "the HTTP server",
    "uvicorn": "the HTTP server",
    "prometheus-client": "metrics of the HTTP server",
    "wandb": "tracking",
    "matplotlib": "pictures of the report",
    "mtkahypar": "an optional start of the solver",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table.

    Attributes:
        area: Group of lines.
        name: What was looked at.
        state: "ok", "no" (absent, something else serves) or "wrong" (will fail).
        detail: Version, or the reason.
    """

    area: str
    name: str
    state: str
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print all findings; 1 if anything is wrong."""
    from semantic_ep.cli import EXIT_NO, EXIT_OK

    # Frameworks greet on stdout when they are imported; stdout is for the findings.
    with contextlib.redirect_stdout(sys.stderr):
        findings = [
            *_packages(),
            *_machine(),
            *_backends(),
            *_overlap(),
            *_kernel_libraries(),
            *_seams(),
        ]
    if args.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        _print(findings)
    return EXIT_NO if any(finding.state == "wrong" for finding in findings) else EXIT_OK


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    ranges = {}
    for text in metadata.requires("semantic_ep") or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", "all")):
            ranges[requirement.name] = requirement.specifier
    for name, purpose in PURPOSE.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(
                area="packages", name=name, state="no", detail=f"not installed: {purpose}"
            )
            continue
        allowed = ranges.get(name)
        inside = allowed is None or allowed.contains(version, prereleases=True)
        yield Finding(
            area="packages",
            name=name,
            state="ok" if inside else "wrong",
            detail=f"{version} ({purpose})" if inside else f"{version}, tested with {allowed}",
        )
    yield _apex()


def _apex() -> Finding:
    """NVIDIA's apex speeds Megatron up; any other module of that name breaks it."""
    if importlib.util.find_spec("apex") is None:
        detail = "not installed; Megatron-core falls back to torch's optimizer and norms"
        return Finding(area="packages", name="apex", state="no", detail=detail)
    if importlib.util.find_spec("amp_C") is None:
        detail = (
            "a module named apex is importable, but it is not NVIDIA's (no amp_C); Megatron-core "
            "takes it for NVIDIA's and fails. Uninstall it"
        )
        return Finding(area="packages", name="apex", state="wrong", detail=detail)
    return Finding(area="packages", name="apex", state="ok", detail="NVIDIA's, with extensions")


def _machine() -> Iterator[Finding]:
    yield Finding(
        area="machine",
        name="python",
        state="ok",
        detail=f"{platform.python_version()} on {platform.machine()}",
    )
    if importlib.util.find_spec("torch") is not None:
        import torch

        count = torch.cuda.device_count()
        names = sorted({torch.cuda.get_device_name(i) for i in range(count)})
        detail = f"{count} x {', '.join(names)}" if count else "none; everything runs on CPU (gloo)"
        yield Finding(area="machine", name="GPUs", state="ok" if count else "no", detail=detail)


def _backends() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    from semantic_ep.runtime.backends import backend_report

    chosen = False
    for name, available, reason in backend_report():
        mark = " (what auto tries first here)" if available and not chosen else ""
        chosen = chosen or available
        yield Finding(
            area="dispatch backends",
            name=name,
            state="ok" if available else "no",
            detail=reason + mark,
        )


def _overlap() -> Iterator[Finding]:
    """From how many rows on experts start while others' rows travel, on this device."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    from semantic_ep.runtime.overlap import describe, device_rates

    on_gpu = torch.cuda.is_available()
    rates = device_rates(
        torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    )
    yield Finding(area="local-first overlap", name="torch", state="ok", detail=describe(rates))


def _kernel_libraries() -> Iterator[Finding]:
    from semantic_ep.runtime.kernels import build

    for flavour in ("cuda", "emulator"):
        outcome = build.find_library(flavour, build=False)
        yield Finding(
            area="kernel libraries",
            name=flavour,
            state="ok" if outcome.path else "no",
            detail=str(outcome.path or outcome.reason),
        )
    for name, path in (("C++ compiler", build.find_cxx()), ("nvcc", build.find_nvcc())):
        yield Finding(
            area="kernel libraries",
            name=name,
            state="ok" if path else "no",
            detail=str(path or "not found"),
        )
    ninja = shutil.which("ninja")
    yield Finding(
        area="kernel libraries",
        name="ninja",
        state="ok" if ninja else "no",
        detail=ninja or "not on PATH; DeepSpeed cannot compile its own operators",
    )


def _seams() -> Iterator[Finding]:
    from semantic_ep.patches import registry

    # Probing imports the frameworks, which announce their own fallbacks; the table says it all.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    states = {"applied": "ok", "ready": "ok", "inactive": "ok", "not installed": "no"}
    for seam in registry.seams():
        status = registry.check(seam)
        yield Finding(
            area="seams",
            name=seam.name,
            state=states.get(status.state, "wrong"),
            detail=status.state + (f": {status.detail}" if status.detail else ""),
        )


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for area in dict.fromkeys(finding.area for finding in findings):
        table = Table(title=area, title_justify="left", show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column()
        table.add_column(overflow="fold")
        for finding in findings:
            if finding.area == area:
                table.add_row(finding.name, SYMBOLS[finding.state], finding.detail)
        console.print(table)
        console.print()
