"""The flag of the verbs that can record what they did."""

from __future__ import annotations

import argparse


def add_wandb_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Declare `--wandb`; `what` says what is recorded, and where besides."""
    parser.add_argument(
        "--wandb",
        choices=("auto", "online", "offline", "disabled"),
        default="disabled",
        help=f"{what} Weights & Biases (default: disabled)",
    )


def refuse_dry_run(args: argparse.Namespace) -> None:
    """Refuse to record what is not done.

    Raises:
        ConfigError: Both `--dry-run` and `--wandb` were given.
    """
    from semantic_ep.errors import ConfigError, explain

    if args.dry_run and args.wandb != "disabled":
        raise ConfigError(
            explain("a dry run is not recorded", where="--dry-run and --wandb", do="Give one")
        )
