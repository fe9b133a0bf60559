"""Flags of everything that serves a model; free of torch, so that help is fast."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from semantic_ep.config import add_arguments

DTYPES = ("float32", "bfloat16", "float16")


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the model, its plan and the ranks: flags of the server and of prompt lists."""
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face checkpoint")
    parser.add_argument("--plan", type=Path, help="plan artefact; default: semantic_ep.plan")
    parser.add_argument(
        "--decode-plan",
        type=Path,
        help="another one for generated tokens; default: semantic_ep.serve.decode_plan",
    )
    parser.add_argument(
        "--deepspeed_config", "--config", type=Path, help='JSON with a "semantic_ep" section'
    )
    parser.add_argument("--deepspeed", action="store_true", help="accepted, as DeepSpeed's scripts")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--peer-timeout", type=float, default=50, help="seconds to wait for a rank")
    parser.add_argument(
        "--allow-retrained", action="store_true", help="accept a plan of the model's earlier state"
    )
    add_arguments(parser)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the HTTP server."""
    add_job_arguments(parser)
    parser.add_argument(
        "--topology", type=Path, help="JSON of nodes and links, for the policy semantic"
    )
    parser.add_argument(
        "--profile", type=Path, help="what the plan was made from; /metrics then tells the drift"
    )
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="default: loopback")
    http.add_argument("--port", type=int, default=8000)
    http.add_argument("--model-name", help="for clients; default: name of the directory")
    http.add_argument("--api-key-file", type=Path, help="one key a line; or SEMANTIC_EP_API_KEY")
    http.add_argument("--max-body-bytes", type=positive, default=4 * 2**20)
    http.add_argument("--max-waiting", type=int, default=896, help="sequences beyond those running")
    http.add_argument("--drain-seconds", type=float, default=20, help="bound after SIGTERM")
    http.add_argument(
        "--admin-dir",
        type=Path,
        help="switches on routes that record routing profiles into this directory, and that take "
        "over plans in it",
    )


def parse_server_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of one rank of the server."""
    parser = argparse.ArgumentParser(
        prog="deepspeed --module semantic_ep.serve.http",
        description="One rank of an OpenAI-compatible server; rank 0 listens.",
    )
    add_server_arguments(parser)
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
