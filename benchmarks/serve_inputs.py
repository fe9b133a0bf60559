"""What the serving themes serve: a quickstart's run, or a tiny model with planted routing.

Shapes: V vocabulary, D hidden, E experts, L layers, N tokens, K top-k.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from semantic_ep.errors import ConfigError, explain
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace

TOPICS, VOCAB, EXPERTS, LAYERS, TOP_K = 4, 256, 8, 2, 2
RANDOM_REQUESTS = 24
# Of a token's embedding about its topic's, in each dimension.
WORD_SPREAD = 0.7


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """A model, what was observed of it, and requests.

    Attributes:
        model: Hugging Face checkpoint.
        profile: To plan on.
        holdout: Routing of other requests, for the prediction.
        prompts: Token ids.
        source: Where all of it is from, in words.
    """

    model: Path
    profile: RoutingProfile
    holdout: RoutingTrace
    prompts: list[list[int]]
    source: str


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `read_inputs`, except those on the prompts' number and length."""
    parser.add_argument(
        "--run", type=Path, default=Path("runs/quickstart"), metavar="DIR",
        help="output of launch/quickstart.sh, for what is not named (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face checkpoint")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="routing profile to plan on")
    parser.add_argument("--holdout", type=Path, metavar="DIR", help="routing of other requests")
    parser.add_argument("--prompts", type=Path, metavar="JSONL", help='"text" in each row')


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Read what a quickstart left, or the files that were named.

    Raises:
        ConfigError: There is no model, or the prompts cannot be read.
        ArtifactError: A profile or trace is damaged. FingerprintError: It is of another model.
    """
    model = args.model or args.run / "model"
    if not (model / "config.json").is_file():
        raise ConfigError(
            explain(
                "there is no model",
                where=f"--model {model}",
                do="Run launch/quickstart.sh, or try --quick, which needs none",
            )
        )
    from transformers import AutoTokenizer

    from semantic_ep.apply.checkpoint import checkpoint_fingerprint
    from semantic_ep.serve.requests import read_requests

    profile = RoutingProfile.read(args.profile or args.run / "profile")
    holdout = RoutingTrace.load(args.holdout or args.run / "holdout")
    for what, found in (("--model", checkpoint_fingerprint(model)), ("--holdout", holdout)):
        found = getattr(found, "fingerprint", found)
        profile.fingerprint.check(found, what=f"{what}, for the profile,")
    requests = read_requests(
        args.prompts or args.run / "data" / "prompts.jsonl",
        AutoTokenizer.from_pretrained(model, local_files_only=True),
        max_prompt_tokens=args.max_prompt_tokens,
    )
    # A file may be sorted by kind: serve a mixture, also where only some are asked for.
    shuffled = np.random.default_rng(args.seed).permutation(len(requests))
    chosen = [requests[number] for number in shuffled[: args.requests or None]]
    return Inputs(
        model=model,
        profile=profile,
        holdout=holdout,
        prompts=[request.prompt for request in chosen],
        source=f"model {model}, its profile, and held-out prompts",
    )


def planted_inputs(
    directory: Path,
    *,
    requests: int,
    seed: int,
    hidden: int = 32,
    inner: int = 16,
    longest: int = 24,
    looseness: float = 0.1,
) -> Inputs:
    """A tiny random model whose router follows the topic of a token; requests keep to a topic.

    Token t is of topic t mod 4, and so is expert e; a request continues in its topic.

    Args:
        directory: Gets the model.
        requests: How many prompts.
        seed: Of model and requests.
        hidden: Width of the model (D).
        inner: Width of an expert.
        longest: Tokens that a prompt has less than.
        looseness: How far the router's choice among experts differs by token instead of topic:
            standard deviation of the former over the latter's part of a logit.
    """
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from semantic_ep.integrations.routes import record_routes

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=hidden, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, moe_intermediate_size=inner, num_experts=EXPERTS,
        num_experts_per_tok=TOP_K, max_position_embeddings=longest + 128, eos_token_id=VOCAB - 1,
        bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    topic_VD = torch.randn(TOPICS, hidden).repeat(VOCAB // TOPICS, 1)
    token_VD = topic_VD + WORD_SPREAD * torch.randn(VOCAB, hidden)
    # A logit sums D products: a topic's with itself, D, and of noise, which grows as sqrt(D).
    noise = looseness * float(np.sqrt(hidden / (1 + WORD_SPREAD**2)))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(token_VD)
        # The next token is the topic's next word.
        model.lm_head.weight.copy_(token_VD.roll(TOPICS, dims=0))
        for layer in model.model.layers:
            layer.mlp.gate.weight.copy_(
                topic_VD[:EXPERTS] + noise * torch.randn(EXPERTS, hidden)
            )  # The topic of row e is e mod 4.
    model.save_pretrained(directory)
    draw = np.random.default_rng(seed)
    profiled, heldout = (
        record_routes(model.eval(), [_prompt(draw, longest) for _ in range(RANDOM_REQUESTS)])
        for _ in range(2)
    )
    return Inputs(
        model=directory,
        profile=RoutingProfile.from_trace(profiled, vocab_size=VOCAB),
        holdout=heldout,
        prompts=[_prompt(draw, longest) for _ in range(requests)],
        source=f"a random model, {hidden} wide, with {TOPICS} planted topics, and random requests",
    )


def _prompt(draw: np.random.Generator, longest: int) -> list[int]:
    """A request of one topic; the last id ends requests and is none of its words."""
    words = draw.integers(0, VOCAB // TOPICS - 1, size=int(draw.integers(4, longest)))
    ids: list[int] = (words * TOPICS + draw.integers(TOPICS)).tolist()
    return ids
