"""`semantic-ep import`: routing recorded by another tool, as an artefact to plan on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_ep.errors import ConfigError, explain

if TYPE_CHECKING:
    from semantic_ep.apply.families import MoEShape
    from semantic_ep.artifacts import ModelFingerprint
    from semantic_ep.observe.profile import RoutingProfile
    from semantic_ep.observe.traces import RoutingTrace

LOADS = "sglang-logical-count"
# Format -> name of its reader in `semantic_ep.observe.formats`.
TRACES = {
    "npz": "read_npz_trace",
    "megatron-router-trace": "read_megatron_trace",
    "sglang-per-token": "read_sglang_trace",
    "vllm-routed-experts": "read_vllm_trace",
}
# Formats whose files name the model's layers.
NAMES_LAYERS = ("sglang-per-token", LOADS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    formats = (*TRACES, LOADS)
    parser.add_argument("file", type=Path, metavar="FILE", help="file, or directory of all ranks")
    parser.add_argument(
        "--from",
        dest="format",
        required=True,
        choices=formats,
        metavar="FORMAT",
        help=", ".join(formats),
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help=f"trace to write ({LOADS}: profile; with --profile-fraction: directory of both)",
    )
    parser.add_argument(
        "--profile-fraction",
        type=float,
        metavar="F",
        help="write DIR/profile from this share of the requests and DIR/holdout from the others",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="JSON",
        help="the model's config.json: its MoE layers, experts and top-k",
    )
    parser.add_argument(
        "--layer-ids",
        metavar="IDS",
        help="model layer of each recorded MoE layer, as in 1-26 or 3,5,7-9, where the format does "
        "not name it (default: from --config, else as recorded, mostly numbered from 0)",
    )
    parser.add_argument(
        "--num-experts",
        type=int,
        metavar="E",
        help="routed experts a layer (default: from --config, else from the largest id)",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help=f"{LOADS}: experts a token activates"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    parser.add_argument("--dry-run", action="store_true", help="read and check, write nothing")


def run(args: argparse.Namespace) -> int:
    """Read, write, say what to do next."""
    from semantic_ep.apply.checkpoint.reader import read_shape
    from semantic_ep.cli import EXIT_OK
    from semantic_ep.observe.profile import RoutingProfile

    shape = None if args.config is None else read_shape(args.config)
    _check_flags(args, shape)
    written: dict[Path, RoutingTrace | RoutingProfile] = {}
    if args.format == LOADS:
        profile = _load_profile(args, shape)
        written[args.output] = profile
        fingerprint = profile.fingerprint
    else:
        trace = _read_trace(args, shape)
        fingerprint = trace.fingerprint
        if args.profile_fraction is None:
            written[args.output] = trace
        else:
            planned, rest = _split(trace, args)
            written[args.output / "profile"] = RoutingProfile.from_trace(planned)
            written[args.output / "holdout"] = rest
    if shape is not None:
        _check_model(fingerprint, shape, args)
    if not args.dry_run:
        for path, artefact in written.items():
            artefact.save(path)
    _print(written, args)
    return EXIT_OK


def _read_trace(args: argparse.Namespace, shape: MoEShape | None) -> RoutingTrace:
    from semantic_ep.observe import formats

    reader: Callable[..., RoutingTrace] = getattr(formats, TRACES[args.format])
    experts = args.num_experts
    if experts is None and shape is not None:
        experts = shape.num_experts
    if args.format in NAMES_LAYERS:
        return reader(args.file, num_experts=experts)
    layers = None if args.layer_ids is None else parse_layer_ids(args.layer_ids)
    if layers is None and shape is not None:
        layers = shape.layer_ids
    return reader(args.file, num_experts=experts, layer_ids=layers)


def parse_layer_ids(text: str) -> tuple[int, ...]:
    """Return the layers that e.g. "1-26" or "3,5,7-9" lists.

    Raises:
        ConfigError: The text is no such list.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(
                explain(
                    "not a list of layers",
                    where="--layer-ids",
                    got=text,
                    allowed="layers and ranges of them, as in 1-26 or 3,5,7-9",
                )
            )
        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)


def _check_model(found: ModelFingerprint, shape: MoEShape, args: argparse.Namespace) -> None:
    """Refuse a recording that is not of the model whose config was given."""
    wrong = [
        f"{name} {getattr(found, name)} instead of {getattr(shape, name)}"
        for name in ("layer_ids", "num_experts", "top_k")
        if getattr(found, name) != getattr(shape, name)
    ]
    if wrong:
        raise ConfigError(
            explain(
                "the recording is not of this model",
                where=f"--config {args.config}",
                got="; ".join(wrong),
                do="Give the config.json of the recorded model",
            )
        )


def _load_profile(args: argparse.Namespace, shape: MoEShape | None) -> RoutingProfile:
    from semantic_ep.artifacts import ModelFingerprint
    from semantic_ep.observe.formats import read_logical_count
    from semantic_ep.observe.profile import RoutingProfile

    load, layer_ids = read_logical_count(args.file)
    top_k = args.top_k if shape is None else shape.top_k
    return RoutingProfile.from_load(
        load,
        ModelFingerprint(
            architecture="", layer_ids=layer_ids, num_experts=load.shape[1], top_k=top_k
        ),
    )


def _split(trace: RoutingTrace, args: argparse.Namespace) -> tuple[RoutingTrace, RoutingTrace]:
    planned, rest = trace.split(args.profile_fraction, seed=args.seed)
    if not (planned.num_tokens and rest.num_tokens):
        raise ConfigError(
            explain(
                "a part of the split would be empty",
                where="--profile-fraction",
                got=f"{args.profile_fraction} of {trace.num_requests} requests",
                do="Record more requests, or choose another share",
            )
        )
    return planned, rest


def _check_flags(args: argparse.Namespace, shape: MoEShape | None) -> None:
    problem = None
    if args.top_k is not None and shape is not None:
        problem = "the config tells how many experts a token activates", "--top-k", args.top_k
    elif args.format in NAMES_LAYERS and args.layer_ids is not None:
        problem = f"{args.format} names the model's layers", "--layer-ids", args.layer_ids
    elif args.format == LOADS and shape is None and (args.top_k is None or args.top_k < 1):
        problem = f"{LOADS} does not tell how many experts a token activates", "--top-k", args.top_k
    elif args.format == LOADS and args.profile_fraction is not None:
        problem = f"{LOADS} has no requests to split", "--profile-fraction", args.profile_fraction
    elif args.format == LOADS and args.num_experts is not None:
        problem = f"{LOADS} tells the number of experts", "--num-experts", args.num_experts
    elif args.format != LOADS and args.top_k is not None:
        problem = "a trace tells how many experts a token activates", "--top-k", args.top_k
    elif args.profile_fraction is not None and not 0 < args.profile_fraction < 1:
        problem = "not a share of the requests", "--profile-fraction", args.profile_fraction
    if problem is not None:
        what, where, got = problem
        do = "Give it" if got is None else "Leave it out, or give a fitting value"
        raise ConfigError(explain(what, where=where, got=got, do=do))


def _print(written: dict[Path, Any], args: argparse.Namespace) -> None:
    rows = [
        {
            "output": None if args.dry_run else str(path),
            "kind": kind,
            "layers": artefact.fingerprint.num_layers,
            "experts": artefact.fingerprint.num_experts,
            "top_k": artefact.fingerprint.top_k,
            "tokens": tokens,
        }
        for path, artefact in written.items()
        for kind, tokens in (_describe(artefact),)
    ]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            f"{row['kind']}: {row['layers']} MoE layers x {row['experts']} experts, top-"
            f"{row['top_k']}, {row['tokens']:,.0f} tokens; "
            + (f"written to {row['output']}" if row["output"] else "dry run: not written")
        )


def _describe(artefact: RoutingTrace | RoutingProfile) -> tuple[str, float]:
    """(kind, tokens) of a profile or trace."""
    from semantic_ep.observe.traces import RoutingTrace

    if isinstance(artefact, RoutingTrace):
        return "trace", artefact.num_tokens
    return "profile", artefact.tokens
