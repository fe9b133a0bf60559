"""Schedulers by the name of their policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from semantic_ep.errors import ConfigError, explain, nearest
from semantic_ep.plan.schedule import Schedule
from semantic_ep.serve.scheduling.affinity import RankHits
from semantic_ep.serve.scheduling.cost import ServingCost
from semantic_ep.serve.scheduling.policies import (
    LeastLoaded,
    Policy,
    PrefixOnly,
    RoundRobin,
    Semantic,
    SemanticWindow,
)
from semantic_ep.serve.scheduling.prefix import PrefixIndex
from semantic_ep.serve.scheduling.queue import Scheduler

POLICIES = ("semantic", "semantic-window", "prefix-only", "least-loaded", "round-robin")


def make_scheduler(
    name: str,
    *,
    ep_size: int,
    schedule: Schedule | None = None,
    decode_schedule: Schedule | None = None,
    top_k: int = 1,
    cost: ServingCost | None = None,
    prefix_block_size: int = 64,
    prefix_tokens_per_rank: int = 0,
    **options: Any,
) -> Scheduler:
    """Return a fresh scheduler.

    Args:
        name: One of `POLICIES`.
        ep_size: Number of EP ranks (G).
        schedule: Of the plan in use; the semantic policies look prompts up in it. None: no plan.
        decode_schedule: Of the plan for generated tokens, if they have one of their own.
        top_k: Experts a token activates (K), for the schedule.
        cost: Predicted times; "semantic" needs them.
        prefix_block_size: Tokens that the index of prefixes tells beginnings apart by: a few blocks
            of the engine's cache, because a decision takes longer with every one.
        prefix_tokens_per_rank: Tokens that a rank's prefix cache holds; 0: there is none.
        **options: Of `Scheduler`: "max_sequences", "max_wait_seconds".

    Raises:
        ConfigError: The name is unknown, or what the policy needs is missing or does not fit.
    """
    for what, found in (
        ("schedule", schedule),
        ("schedule of generated tokens", decode_schedule),
        ("cost model", cost),
    ):
        if found is not None and found.ep_size != ep_size:
            raise ConfigError(
                explain(f"the {what} is for other ranks", got=found.ep_size, allowed=ep_size)
            )
    hits = decode_hits = None
    if schedule is not None and name.startswith("semantic"):
        hits = RankHits.from_schedule(schedule, top_k=top_k)
        if decode_schedule is not None:
            decode_hits = RankHits.from_schedule(decode_schedule, top_k=top_k)
    prefixes = None
    if prefix_tokens_per_rank:
        prefixes = PrefixIndex(
            ep_size=ep_size, block_size=prefix_block_size, tokens_per_rank=prefix_tokens_per_rank
        )
    return Scheduler(
        _policy(name, cost),
        ep_size=ep_size,
        hits=hits,
        decode_hits=decode_hits,
        prefixes=prefixes,
        **options,
    )


def _policy(name: str, cost: ServingCost | None) -> Policy:
    if name == "semantic":
        if cost is None:
            raise ConfigError(explain('policy "semantic" needs the cost of serving the model'))
        return Semantic(cost)
    plain: dict[str, Callable[[], Policy]] = {
        "semantic-window": SemanticWindow,
        "prefix-only": PrefixOnly,
        "least-loaded": LeastLoaded,
        "round-robin": RoundRobin,
    }
    if name not in plain:
        close = nearest(name, POLICIES)
        raise ConfigError(
            explain(
                "unknown scheduling policy",
                got=name,
                allowed=POLICIES,
                do=f'Did you mean "{close}"?' if close else "Choose one of them",
            )
        )
    return plain[name]()
