#!/usr/bin/env python3
"""Record which experts a Hugging Face model sends each token of some prompts to.

    python launch/record.py --model M --prompts prompts.jsonl -o routes.npz

For models that run elsewhere: one process, no expert parallelism, nothing generated. The file is
the plain npz of `semantic-ep import --from npz`; `routes.requests.jsonl` beside it names the
prompts. Routes can reveal text: keep the files as you keep the prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from semantic_ep.errors import ConfigError, SemanticEPError, explain
from semantic_ep.integrations.transformers import find_moe_layers, model_fingerprint
from semantic_ep.observe.formats import write_npz_trace
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.serve.requests import read_requests

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face checkpoint")
    parser.add_argument("--prompts", type=Path, required=True, help='JSONL with "text" in each row')
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.npz")
    parser.add_argument("--max-prompt-tokens", type=int, default=512, help="longer ones are cut")
    parser.add_argument("--num-requests", type=int, default=0, help="first rows; 0: all")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    if args.output.suffix != ".npz":
        parser.error(f"--output must end in .npz, and is {args.output}")
    return args


def route(model: Any, prompts: list[list[int]]) -> RoutingTrace:
    """Send each prompt through the model; one request a prompt, with token ids."""
    chosen: list[torch.Tensor] = []
    hooks = [
        model.get_submodule(site.router).register_forward_hook(
            lambda _module, _args, output: chosen.append(output[2].cpu())
        )
        for site in find_moe_layers(model)
    ]
    routes = []
    try:
        with torch.inference_mode():
            for ids in tqdm(prompts, desc="route", disable=None):
                chosen.clear()
                token_id = torch.tensor([ids], device=model.device)
                # Logits of the last position alone: nothing is generated.
                model(input_ids=token_id, use_cache=False, logits_to_keep=1)
                routes.append(torch.stack(chosen, dim=1).numpy())
    finally:
        for hook in hooks:
            hook.remove()
    return RoutingTrace(
        fingerprint=model_fingerprint(model),
        experts=np.concatenate(routes).astype(np.uint16),
        offsets=np.cumsum([0, *map(len, prompts)]),
        token_id=np.concatenate([np.asarray(ids) for ids in prompts]).astype(np.int32),
    )


def run(args: argparse.Namespace) -> None:
    """Load, route, write.

    Raises:
        ConfigError: There is no checkpoint. CheckpointError: Its family is not known.
    """
    if not (args.model / "config.json").is_file():
        raise ConfigError(explain("there is no checkpoint here", where=f"--model {args.model}"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    requests = read_requests(
        args.prompts, tokenizer, max_prompt_tokens=args.max_prompt_tokens, limit=args.num_requests
    )
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=DTYPES[args.dtype], local_files_only=True
    )
    model = model.to("cuda" if cuda else "cpu").eval()
    described = [{k: v for k, v in request.row.items() if k != "text"} for request in requests]
    trace = dataclasses.replace(
        route(model, [request.prompt for request in requests]), requests=tuple(described)
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_npz_trace(trace, args.output)
    print(f"{trace.num_tokens} tokens of {trace.num_requests} requests written to {args.output}")


def main(argv: list[str] | None = None) -> int:
    """Record; returns a process exit code."""
    try:
        run(parse_arguments(argv))
    except SemanticEPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
