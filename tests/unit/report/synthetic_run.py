"""A run directory made through the real classes from routing with planted structure.

Three kinds of text have words of their own and share some. Each word of a kind prefers the experts
of its kind's rank; the experts of a rank are scattered over expert ids, so the contiguous placement
finds nothing and the planted one finds most.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.cost import evaluate
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.plan import Plan
from semantic_ep.plan.requests import assign_in_windows
from semantic_ep.plan.schedule import Schedule
from semantic_ep.plan.verdict import verdict

_TEXTS = {
    "python": "def self return import lambda None yield async dict list __init__ raise with "
    "except isinstance kwargs",
    "c++": "std:: template const nullptr inline #include namespace uint64_t typename virtual "
    "override struct -> :: noexcept static_cast",
    "english": "the government people house years against national said country history war "
    "children public world between president",
    "licence": "warranty liability Licensor hereby conditions copyright notice distribution "
    "MERCHANTABILITY damages herein sublicense obligations thereof grant permission",
}
WORDS = {kind: text.split() for kind, text in _TEXTS.items()}
COMMON = [".", ",", "(", ")", " ", "\n", "a", "of", "in", "=", "<b>&", "for"]
VOCABULARY = [word for words in WORDS.values() for word in words] + COMMON
KINDS = tuple(WORDS)
RANKS, LAYERS, EXPERTS, TOP_K = 4, 6, 16, 2
HIDDEN_BYTES = 4 * 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticRun:
    path: Path
    serve: dict[str, Any]


def make_run(
    path: Path, *, requests: int = 160, seed: int = 0, affinity: float = 0.8
) -> SyntheticRun:
    """Write every stage of a run; `affinity` is the share of activations that follow the kind."""
    rng = np.random.default_rng(seed)
    rank_of_expert = np.stack([rng.permutation(np.arange(EXPERTS) % RANKS) for _ in range(LAYERS)])
    (path / "data").mkdir(parents=True)
    tokenizer_sha256 = _write_tokenizer(path / "data" / "tokenizer.json")
    fingerprint = ModelFingerprint(
        architecture="synthetic_moe",
        layer_ids=tuple(range(LAYERS)),
        num_experts=EXPERTS,
        top_k=TOP_K,
        tokenizer_sha256=tokenizer_sha256,
    )
    trace = _trace(fingerprint, rank_of_expert, requests, affinity, rng)
    seen, unseen = trace.split(0.6, seed=seed)
    profile = RoutingProfile.from_trace(seen, vocab_size=len(VOCABULARY))
    profile_sha = profile.save(path / "profile")
    unseen.save(path / "holdout")
    placement = Placement.from_rank_of_expert(rank_of_expert, ep_size=RANKS)
    plan = Plan(
        placement=placement,
        schedule=Schedule.from_profile(profile, placement),
        verdict=verdict(
            {"contiguous": contiguous(fingerprint), "semantic": placement},
            chosen="semantic",
            profile=profile,
            holdout=unseen,
            mode="requests",
        ),
        fingerprint=fingerprint,
    )
    plan.save(path / "plan", parents={"profile": profile_sha})
    serve = serve_result(unseen, plan)
    (path / "serve.json").write_text(json.dumps(serve))
    write_train_log(path / "train.jsonl")
    write_load_benchmark(path / "serve_benchmark.json")
    return SyntheticRun(path=path, serve=serve)


def contiguous(fingerprint: ModelFingerprint) -> Placement:
    return Placement.contiguous(
        num_layers=fingerprint.num_layers, num_experts=fingerprint.num_experts, ep_size=RANKS
    )


def write_load_benchmark(path: Path) -> None:
    """What `benchmarks.run serve --json` writes, as far as a report reads it."""
    rows = [
        {
            "block": "cells",
            "load": load,
            "plan": plan,
            "policy": policy,
            **({} if offered is None else {"requests_per_second_offered": offered}),
            "new_tokens_per_second": 20 * (number + 2) * (1.2 if plan == "semantic" else 1.0),
            "ttft_p50_ms": 10.0 * (number + 1),
            "ttft_p99_ms": 30.0 * (number + 1),
            "tpot_p50_ms": 4.0 + number,
            "goodput": 3.0 + number,
        }
        # Written as measured: the burst first, and then the lighter loads.
        for number, (load, offered) in (
            (2, ("all at once", None)),
            (0, ("0.5 of the baseline", 2.0)),
            (1, ("0.9 of the baseline", 3.6)),
        )
        for plan in ("contiguous", "semantic")
        for policy in ("round-robin", "semantic")
    ]
    other = {"block": "engine against generate", "batch": 1, "new_tokens_per_second": 5.0}
    protocol = {
        "source": "a synthetic model",
        "ranks": "4, gloo",
        "baseline": "contiguous, round-robin",
        "slo_ms": {"ttft": 50.0, "tpot": 20.0},
    }
    command = ["python", "-m", "benchmarks.run", "serve"]
    document = {"theme": "serve", "command": command, "protocol": protocol, "rows": [*rows, other]}
    path.write_text(json.dumps(document))


def write_train_log(path: Path) -> None:
    losses = [(step, 4.6 + 4.5 * math.exp(-step / 60)) for step in range(0, 300, 5)]
    rows = [
        {"step": step, "loss": loss, "lr": 1e-3, "tokens": 4096 * step, "seconds": 0.5 * step}
        for step, loss in losses
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def serve_result(trace: RoutingTrace, plan: Plan) -> dict[str, Any]:
    """What serving `trace` would count, in the form of `serve.json`."""
    bounds = list(zip(trace.offsets[:-1], trace.offsets[1:], strict=True))
    scores = np.stack([plan.schedule.request_score(trace.token_id[a:b]) for a, b in bounds])
    fingerprint = trace.fingerprint
    modes = {
        "contiguous": _mode(trace, contiguous(fingerprint), np.zeros_like(scores)),
        "semantic": _mode(trace, plan.placement, scores),
    }
    return {
        "ep_size": plan.placement.ep_size,
        "model": dataclasses.asdict(fingerprint),
        "num_requests": trace.num_requests,
        "max_new_tokens": 16,
        "identical_outputs": {
            "between_modes": True,
            "to_single_process": True,
            "checked_requests": trace.num_requests,
        },
        "modes": modes,
    }


def _mode(trace: RoutingTrace, placement: Placement, scores: np.ndarray) -> dict[str, Any]:
    ranks = placement.ep_size
    lengths = np.diff(trace.offsets)
    rank_R = assign_in_windows(scores, lengths)
    home = rank_R[trace.request_of_token]
    cost = evaluate(placement, trace, home)
    sent = cost.bytes_between_ranks(HIDDEN_BYTES)
    loads = [
        np.bincount(
            placement.rank_of_expert[layer][trace.experts[:, layer]].ravel(), minlength=ranks
        )
        for layer in range(placement.num_layers)
    ]
    expert_load = [
        np.bincount(trace.experts[:, layer].ravel(), minlength=placement.num_experts)
        for layer in range(placement.num_layers)
    ]
    seconds = 1e-9 * float(sent.sum())
    return {
        "lar": cost.lar.tolist(),
        "remote_copies": cost.remote_copies.tolist(),
        "bytes_dispatch": sent.tolist(),
        "bytes_combine": sent.T.tolist(),
        "rank_load": [load.tolist() for load in loads],
        "expert_load": [load.tolist() for load in expert_load],
        "tokens_per_rank": np.bincount(home, minlength=ranks).tolist(),
        "requests_per_rank": np.bincount(rank_R, minlength=ranks).tolist(),
        "seconds": {
            "dispatch": seconds,
            "experts": 0.4,
            "combine": seconds,
            "total": 0.4 + 2 * seconds,
        },
        "generated_tokens": 16 * trace.num_requests,
        "tokens_per_second": 16 * trace.num_requests / (0.4 + 2 * seconds),
        "rounds": [],
        "expert_bytes_resident": [1 << 20] * ranks,
        "expert_bytes_total": ranks << 20,
    }


def _trace(
    fingerprint: ModelFingerprint,
    rank_of_expert: np.ndarray,
    requests: int,
    affinity: float,
    rng: np.random.Generator,
) -> RoutingTrace:
    words = {word: index for index, word in enumerate(VOCABULARY)}
    kind_of_token = {words[w]: k for k, kind in enumerate(KINDS) for w in WORDS[kind]}
    lengths = rng.integers(40, 160, size=requests)
    labels = [KINDS[i % len(KINDS)] for i in range(requests)]
    ids = []
    for kind, length in zip(labels, lengths, strict=True):
        own = rng.choice([words[w] for w in WORDS[kind]], length)
        common = rng.choice([words[w] for w in COMMON], length)
        ids.append(np.where(rng.random(length) < 0.7, own, common))
    token_id = np.concatenate(ids)
    home = np.array([kind_of_token.get(int(token), -1) for token in token_id])
    weight = np.full((len(token_id), LAYERS, EXPERTS), 1 / EXPERTS)
    preferred = rank_of_expert[None] == home[:, None, None]
    weight = (1 - affinity) * weight + affinity * RANKS / EXPERTS * preferred
    weight[home < 0] = 1 / EXPERTS
    # The largest of log-weights plus Gumbel noise are a sample without replacement.
    noisy = np.log(weight + 1e-9) + rng.gumbel(size=weight.shape)
    routes = np.argsort(-noisy, axis=2)[:, :, :TOP_K]
    return RoutingTrace(
        fingerprint=fingerprint,
        experts=routes.astype(np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        token_id=token_id.astype(np.int32),
        requests=tuple({"id": f"{kind}/{i}", "kind": kind} for i, kind in enumerate(labels)),
    )


def _write_tokenizer(path: Path) -> str:
    from tokenizers import Tokenizer, models

    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=".")).save(str(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()
