"""Run every theme, each in a process of its own: `python -m benchmarks.run all`.

Themes that need recordings read them below --data, those that need a trained model below --run;
what is missing, or what this machine cannot do, is skipped with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from pathlib import Path

from benchmarks.registry import theme_module, themes

SUMMARY = "Every theme, each in a process of its own."
_V2 = "{data}/traces/deepseek_v2_lite_chat.npz"
_OSS = "{data}/traces/gpt_oss_20b.npz"
# Themes whose own --quick serves a model of its own.
_QUICK_ALONE = ("serve", "serve_prefix", "slow_links")
# Theme -> flags that it needs, and flags for a quick look. A theme that is not here needs none.
_FLAGS = {
    "lookahead": (["--run", "{run}"], ["--max-tokens", "32"]),
    "serve": (["--run", "{run}"], []),
    "serve_prefix": (["--run", "{run}"], []),
    "serve_phases": (["--run", "{run}"], ["--documents", "40", "--requests", "12"]),
    "slow_links": (["--run", "{run}"], []),
    "plan": (["--trace", _V2, "--trace", _OSS], ["--ep", "4", "--seeds", "1", "--methods", "eplb"]),
    "plan_bounds": (["--trace", _OSS], ["--ep", "4"]),
    "plan_scale": (["--trace", _V2], ["--layers", "1", "--vocab", "8000", "--ep", "8"]),
    "plan_sensitivity": (["--trace", _OSS], ["--layers", "1", "--evaluate-tokens", "4000"]),
    "scale": (["--trace", _V2, _OSS], []),
    "serve_policies": (["--data", "{data}"], []),
    "apply": ([], ["--layers", "1", "--hidden", "64", "--inner", "64", "--rounds", "1"]),
    "dispatch": ([], ["--ranks", "2", "--tokens", "64", "--hidden", "64", "--repeats", "3"]),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `all`."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="holds traces/, serving/, ...")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/quickstart"), metavar="DIR",
        help="output of launch/quickstart.sh (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR",
        help="gets <theme>_<hardware>_<yyyymm>.json, .md and .png",
    )  # fmt: skip
    parser.add_argument("--hardware", default="cpu", help="part of the files' names")
    parser.add_argument("--quick", action="store_true", help="the smallest setting of each theme")
    parser.add_argument(
        "--track", action="store_true",
        help="record each theme below --output, and in W&B (WANDB_* name project and group)",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="THEME", help="some themes (default: all)")


def run_all(args: argparse.Namespace) -> int:
    """Run theme after theme; returns 0 if none failed, else 1."""
    failed = 0
    for theme in args.only or themes():
        needs = command(theme, quick=args.quick, data=args.data, run=args.run)
        if isinstance(needs, str):
            print(f"{theme}: skipped, {needs}")
            continue
        unavailable = getattr(theme_module(theme), "unavailable", None)
        if unavailable is not None and (reason := unavailable()) is not None:
            print(f"{theme}: skipped, {reason}")
            continue
        stem = f"{theme}_{args.hardware}_{datetime.datetime.now(datetime.UTC):%Y%m}"
        args.output.mkdir(parents=True, exist_ok=True)
        outputs = ["--json", str(args.output / f"{stem}.json")]
        outputs += ["--markdown", str(args.output / f"{stem}.md")]
        if args.track:
            outputs += ["--track", str(args.output / stem)]
        done = subprocess.run([sys.executable, "-m", "benchmarks.run", *needs, *outputs])
        print(f"{theme}: {'done' if done.returncode == 0 else f'failed ({done.returncode})'}")
        failed += done.returncode != 0
    return 1 if failed else 0


def command(theme: str, *, quick: bool, data: Path | None, run: Path) -> list[str] | str:
    """Arguments of `benchmarks.run` for a theme; or why it has none, as a text."""
    needed, small = _FLAGS.get(theme, ([], []))
    if quick and theme in _QUICK_ALONE:
        needed = []
    if data is None and any("{data}" in word for word in needed):
        return "needs --data"
    if "{run}" in needed and not (run / "model").is_dir():
        return f"needs --run, and launch/quickstart.sh has left no model in {run}"
    arguments = [theme, *(word.format(data=data, run=run) for word in needed)]
    if quick:
        arguments += small
        probe = argparse.ArgumentParser()
        theme_module(theme).add_arguments(probe)
        if "--quick" in probe.format_usage():
            arguments.append("--quick")
    return arguments
