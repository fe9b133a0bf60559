"""The main job on one machine: fine-tune, observe, plan, apply, serve, report.

Each stage is the command that a user would type, printed before it runs; this file only puts them
in order. Everything lands in `runs/NAME`, and the last lines state what was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from semantic_ep.serve.summary import wire_bytes

REPO = Path(__file__).resolve().parents[1]
EXIT_OK, EXIT_NO, EXIT_ERROR = 0, 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How large the job is; the defaults of the stages hold for the full one."""

    corpus: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    plan: tuple[str, ...] = ()
    serve: tuple[str, ...] = ()


FULL = Size()
FAST = Size(
    corpus=("--max-megabytes", "1.5", "--vocab-size", "2048"),
    train=("--steps", "40", "--hidden-size", "96", "--moe-intermediate-size", "64"),
    plan=("--time-limit", "5"),
    serve=("--num-requests", "16", "--max-new-tokens", "8", "--rounds", "2"),
)


def main() -> int:
    """Run all stages; returns a process exit code."""
    args = parse_arguments()
    run = REPO / "runs" / args.run
    if run.exists() and any(run.iterdir()) and not args.keep:
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    devices = device_of(args)
    print(f"Run directory: {run.relative_to(REPO)}; {devices.description}\n", flush=True)
    started = time.monotonic()
    commands = stages(args, run.relative_to(REPO), devices)
    for number, (title, command) in enumerate(commands, start=1):
        print(f"[{number}/{len(commands)}] {title}\n    $ {shlex.join(command)}", flush=True)
        before = time.monotonic()
        environment = os.environ | devices.environment
        done = subprocess.run([*command], cwd=REPO, env=environment, check=False)
        if done.returncode == EXIT_NO and command[:2] == ("semantic-ep", "plan"):
            print("    the verdict is no; going on, to show what that means when serving")
        elif done.returncode != 0:
            print(f"\nstopped: stage {number} ended with code {done.returncode}", file=sys.stderr)
            return EXIT_ERROR
        print(f"    done in {time.monotonic() - before:.0f} s\n", flush=True)
    check_undo(run)
    return summarise(run, time.monotonic() - started)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of the quickstart; those of a stage can be given to the stage itself."""
    parser = argparse.ArgumentParser(prog="quickstart.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a small version, under two minutes")
    parser.add_argument("--run", default="quickstart", help="name of the directory under runs/")
    parser.add_argument(
        "--data", action="append", default=[], metavar="PATH", help="more text: directory or JSONL"
    )
    parser.add_argument("--train-ranks", type=int, default=2, help="ranks that fine-tune")
    parser.add_argument("--ep-size", type=int, default=4, help="ranks that serve")
    parser.add_argument("--cpu", action="store_true", help="use CPU ranks even where GPUs are")
    parser.add_argument("--keep", action="store_true", help="write into an existing run directory")
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """What the ranks run on."""

    config: str
    description: str
    environment: dict[str, str]


def device_of(args: argparse.Namespace) -> Devices:
    """GPUs if there is one for every rank, else CPU ranks over gloo."""
    import torch

    count = torch.cuda.device_count()
    wanted = max(args.train_ranks, args.ep_size)
    if count >= wanted and not args.cpu:
        return Devices(
            config="configs/debug/gpu_2rank.json",
            description=f"{args.train_ranks} training and {args.ep_size} serving ranks on GPUs",
            environment={},
        )
    why = "as asked" if args.cpu else f"{count} GPUs for {wanted} ranks"
    return Devices(
        config="configs/debug/cpu_2rank.json",
        description=f"{args.train_ranks} training and {args.ep_size} serving ranks on CPU ({why})",
        environment={"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def stages(
    args: argparse.Namespace, run: Path, devices: Devices
) -> list[tuple[str, tuple[str, ...]]]:
    """Titles and commands, in order."""
    size = FAST if args.fast else FULL
    data = [word for path in args.data for word in ("--data", path)]
    plan = (
        *("semantic-ep", "plan", "--profile", f"{run}/profile", "--holdout", f"{run}/holdout"),
        *("--ep-size", str(args.ep_size), "-o", f"{run}/plan", "--wandb", "auto"),
        *size.plan,
    )
    apply = ("semantic-ep", "apply", "--checkpoint", f"{run}/model", "--plan", f"{run}/plan")
    return [
        (
            "Collect text of different kinds and train a tokenizer",
            ("python", "launch/corpus.py", "--output", f"{run}/data", *data, *size.corpus),
        ),
        (
            "Fine-tune a mixture of experts and observe its routing",
            (
                *deepspeed(args.train_ranks, "launch/finetune_deepspeed.py"),
                *("--deepspeed", "--deepspeed_config", devices.config),
                *("--data", f"{run}/data", "--output", str(run), *size.train),
            ),
        ),
        ("Plan where experts and requests go, judged on held-out routing", plan),
        (
            "Write the checkpoint permuted, for engines that know no plan",
            (*apply, "-o", f"{run}/applied", "--wandb", "auto"),
        ),
        (
            "Undo it, to see that the original comes back bit for bit",
            (
                *("semantic-ep", "apply", "--undo", "--checkpoint", f"{run}/applied"),
                *("-o", f"{run}/restored"),
            ),
        ),
        (
            "Serve held-out prompts with contiguous and with semantic placement, interleaved",
            (
                *deepspeed(args.ep_size, "launch/serve.py"),
                *("--deepspeed_config", devices.config, "--model", f"{run}/model"),
                *("--plan", f"{run}/plan", "--prompts", f"{run}/data/prompts.jsonl"),
                *("--compare", "contiguous", "semantic", "--out", f"{run}/serve.json", *size.serve),
            ),
        ),
        ("Draw the report", ("semantic-ep", "report", str(run), "--wandb", "auto")),
    ]


def deepspeed(ranks: int, script: str) -> tuple[str, ...]:
    """Start of a command that runs `script` on `ranks` local ranks, on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = ("--log_level", "warning")
    return ("deepspeed", *quiet, "--num_gpus", str(ranks), "--master_port", str(port), script)


def check_undo(run: Path) -> None:
    """Exit unless the restored checkpoint equals the original file by file."""
    for original in sorted((run / "model").rglob("*")):
        if original.is_file():
            restored = run / "restored" / original.relative_to(run / "model")
            if not restored.is_file() or not filecmp.cmp(original, restored, shallow=False):
                print(f"error: undo did not restore {original.name}", file=sys.stderr)
                raise SystemExit(EXIT_ERROR)
    shutil.rmtree(run / "restored")


def summarise(run: Path, seconds: float) -> int:
    """Print what was measured, from the counters in serve.json; 1 if outputs differ."""
    serve = json.loads((run / "serve.json").read_text())
    modes = serve["modes"]
    print(f"Finished in {seconds:.0f} s. As served on {serve['ep_size']} ranks, from counters:\n")
    print(f"{'':28}{'contiguous':>12}{'semantic':>12}{'change':>9}")
    for label, value in (
        ("local activation rate", lambda mode: np.mean(mode["lar"])),
        ("remote copies a token", lambda mode: np.mean(mode["remote_copies"])),
        ("all-to-all bytes sent (MB)", lambda mode: wire_bytes(mode) / 1e6),
    ):
        before, after = value(modes["contiguous"]), value(modes["semantic"])
        print(f"{label:28}{before:12.3f}{after:12.3f}{(after / before - 1):+9.0%}")
    same = serve["identical_outputs"]
    identical = same["between_modes"] and same["to_single_process"]
    print(
        f"\nOutputs identical between modes: {yes(same['between_modes'])}; to single-process "
        f"Hugging Face: {yes(same['to_single_process'])} ({same['checked_requests']} requests)."
        f"\nReport: {(run / 'report.html').relative_to(REPO)}"
    )
    return EXIT_OK if identical else EXIT_NO


def yes(answer: bool) -> str:
    """Spell out a truth value."""
    return "yes" if answer else "NO"


if __name__ == "__main__":
    sys.exit(main())
