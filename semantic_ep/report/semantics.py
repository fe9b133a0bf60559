"""What is semantic about a placement: the tokens and the kinds of text that each rank attracts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.plan import Plan
from semantic_ep.plan.requests import assign_in_windows
from semantic_ep.report.sources import HOLDOUT_DIR, PROFILE_DIR, RunSources

TOKENS_A_RANK = 28
# Rarer tokens say more about the sample than about the model.
MIN_OCCURRENCES = 20
# What fits beside the picture of the first screen.
SUBJECTS, TOKENS_A_SUBJECT = 4, 4
# Rows of the table of kinds.
KINDS = 16


def semantics(sources: RunSources) -> dict[str, Any]:
    """`{"tokens", "kinds", "subjects"}`; a part that cannot be shown is `{"missing": why}`."""
    tokens, kinds = _tokens(sources), _kinds(sources)
    return {"tokens": tokens, "kinds": kinds, "subjects": _subjects(tokens, kinds)}


def _subjects(tokens: dict[str, Any], kinds: dict[str, Any]) -> list[dict[str, Any]]:
    """The first ranks in a line each: where a kind of text went, and the most typical tokens."""
    ranks = len(tokens.get("ranks", ())) or len(kinds.get("of_rank", [[]])[0])
    lines = []
    for rank in range(min(ranks, SUBJECTS)):
        line: dict[str, Any] = {"rank": rank, "kind": None, "share": None, "tokens": []}
        if "of_rank" in kinds:
            column = [row[rank] for row in kinds["of_rank"]]
            best = int(np.argmax(column))
            line |= {"kind": kinds["kinds"][best], "share": column[best]}
        if "ranks" in tokens:
            words = [token["text"] for token in tokens["ranks"][rank]["tokens"]]
            line["tokens"] = words[:TOKENS_A_SUBJECT]
        lines.append(line)
    return lines


def _tokens(sources: RunSources) -> dict[str, Any]:
    plan, profile = sources.plan, sources.profile
    if plan is None or profile is None:
        return {"missing": "needs the profile and the plan"}
    if sources.tokenizer is None:
        return {"missing": "the tokenizer of the planned model is not in the run directory"}
    try:
        decode = _decoder(sources.tokenizer)
    except ImportError:
        return {"missing": 'needs the tokenizers library: pip install "semantic_ep[report]"'}
    return {
        "source": f"{PROFILE_DIR}/ token counts and plan/ request affinity",
        "how": f"tokens seen at least {MIN_OCCURRENCES} times, each at the rank with most of its "
        "activations (mean over layers), ordered by the excess over 1/G times the square root of "
        "occurrences",
        "ranks": typical_tokens(plan, profile, decode),
    }


def typical_tokens(
    plan: Plan, profile: RoutingProfile, decode: Callable[[int], str | None]
) -> list[dict[str, Any]]:
    """Most typical tokens of each rank.

    Args:
        plan: Gives the affinity of tokens to ranks.
        profile: Gives their occurrences.
        decode: Readable text of a token id, or None for one that has none.

    Returns:
        `{"rank", "tokens": [{"text", "share", "size", "count"}]}` for each of the G ranks, best
        first; share is the part of the token's activations that is on the rank, size its class
        from 1 (nearly blind, 1/G) to 4 (nearly all).
    """
    affinity_VG = plan.schedule.request_affinity.astype(np.float64)
    vocab = min(len(affinity_VG), profile.vocab_size)
    count_V = profile.token_count[:vocab]
    home_V = affinity_VG[:vocab].argmax(axis=1)
    share_V = affinity_VG[:vocab].max(axis=1)
    score_V = (share_V - 1 / plan.schedule.ep_size) * np.sqrt(count_V)
    score_V[count_V < MIN_OCCURRENCES] = -np.inf
    ranks = []
    for rank in range(plan.schedule.ep_size):
        seen: dict[str, dict[str, Any]] = {}
        candidates = np.flatnonzero((home_V == rank) & np.isfinite(score_V))
        for token in candidates[np.argsort(-score_V[candidates], kind="stable")]:
            text = decode(int(token))
            if text is not None and text not in seen:
                seen[text] = {
                    "text": text,
                    "share": float(share_V[token]),
                    "size": _size(float(share_V[token]), plan.schedule.ep_size),
                    "count": float(count_V[token]),
                }
            if len(seen) == TOKENS_A_RANK:
                break
        ranks.append({"rank": rank, "tokens": list(seen.values())})
    return ranks


def _size(share: float, ep_size: int) -> int:
    blind = 1 / ep_size
    return 1 + min(3, int(4 * (share - blind) / (1 - blind))) if ep_size > 1 else 1


def visible(text: str) -> str | None:
    """Spell white space so that it can be seen; None for a token that is no whole character."""
    if not text or "\ufffd" in text:
        return None
    word = text.strip(" ")
    if not word:
        return f"␣×{len(text)}"
    return word.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍").replace(" ", "␣")


def _decoder(tokenizer_json: Path) -> Callable[[int], str | None]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    return lambda token: visible(tokenizer.decode([token], skip_special_tokens=True))


def _kinds(sources: RunSources) -> dict[str, Any]:
    plan, trace = sources.plan, sources.holdout
    if plan is None or trace is None:
        return {"missing": "needs the plan and the held-out trace"}
    if not trace.requests or not all("kind" in request for request in trace.requests):
        return {"missing": "the held-out requests carry no kind"}
    return {
        "source": f"{HOLDOUT_DIR}/ requests, by plan/ request affinity",
        "how": "share of each kind's tokens on each rank, requests assigned from token ids alone "
        "with equal tokens a rank",
        **kinds_by_rank(plan, trace),
    }


def kinds_by_rank(plan: Plan, trace: RoutingTrace) -> dict[str, Any]:
    """Where held-out requests of each kind would run.

    Returns:
        `{"kinds": names, "share": [kinds][G], "of_rank": [kinds][G], "left_out": kinds}` of the
        largest kinds: share is of the kind's tokens (rows sum to 1), of_rank of the rank's.
    """
    bounds = zip(trace.offsets[:-1], trace.offsets[1:], strict=True)
    scores_RG = np.stack([plan.schedule.request_score(trace.token_id[a:b]) for a, b in bounds])
    tokens_R = np.diff(trace.offsets)
    rank_R = assign_in_windows(scores_RG, tokens_R)
    names, kind_R = np.unique([str(r["kind"]) for r in trace.requests], return_inverse=True)
    table = np.zeros((len(names), plan.schedule.ep_size))
    np.add.at(table, (kind_R, rank_R), tokens_R)
    of_rank = table / np.maximum(table.sum(axis=0), 1)
    largest = np.sort(np.argsort(-table.sum(axis=1), kind="stable")[:KINDS])
    left_out = len(names) - len(largest)
    names, table, of_rank = names[largest], table[largest], of_rank[largest]
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    return {
        "kinds": names.tolist(),
        "share": share.tolist(),
        "of_rank": of_rank.tolist(),
        "left_out": left_out,
    }
