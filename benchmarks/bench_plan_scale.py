"""Solve time and memory against the size of the model, on profiles shaped like a real one.

A profile of any size is drawn from the structure of a recorded trace: how often the n-th most
frequent token id occurs, and how an id's activations spread over experts, from its favourite
down. Which experts these are is drawn anew for every id and layer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from benchmarks.registry import Chart, Result, Table
from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.observe.profile import RoutingProfile

TOKENS = 50_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the theme's flags."""
    parser.add_argument("--trace", type=Path, required=True, help="npz trace to take shape from")
    parser.add_argument("--num-experts", type=int, help="experts of the trace's model")
    parser.add_argument("--layers", type=int, nargs="+", default=[7, 14, 29, 58])
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=129_280)
    parser.add_argument("--ep", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=8)


def run(args: argparse.Namespace) -> Result:
    """Time placement and schedule for every number of layers and both modes."""
    tasks = [(args, layers, mode) for layers in args.layers for mode in ("tokens", "requests")]
    # A fresh process for each size: peak_mb is then its own.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        rows = list(pool.map(_measure, tasks))
    title = f"{args.experts} experts, vocabulary {args.vocab}, EP{args.ep} on {args.nodes} nodes"
    return Result(
        theme="plan_scale",
        protocol={
            "shape": f"drawn from {args.trace.name}",
            "ep_size": args.ep,
            "nodes": args.nodes,
            "vocab": args.vocab,
            "experts": args.experts,
            "top_k": args.top_k,
            "definitions": {
                "solve_seconds": "wall time of the placement policy",
                "schedule_seconds": "wall time of building the lookup tables",
                "peak_mb": "largest resident memory of the process, the profile included",
                "nonzeros": "token id x expert cells with a count, all layers",
            },
        },
        rows=rows,
        tables=[Table(title=title, rows=rows)],
        charts=[
            Chart(
                title=title,
                kind="lines",
                rows=rows,
                x="nonzeros",
                y="solve_seconds",
                y_label="solve time, s",
                series="mode",
            )
        ],
    )


def _measure(task: tuple[argparse.Namespace, int, str]) -> dict[str, Any]:
    from semantic_ep.observe.formats import read_npz_trace
    from semantic_ep.plan.policies import policy
    from semantic_ep.plan.schedule import Schedule
    from semantic_ep.topology import Topology

    args, layers, mode = task
    template = RoutingProfile.from_trace(
        read_npz_trace(args.trace, num_experts=args.num_experts), max_sequences=0
    )
    profile = drawn_profile(
        template, layers=layers, experts=args.experts, top_k=args.top_k, vocab=args.vocab
    )
    chosen = policy("semantic" if mode == "tokens" else "semantic-requests")
    topology = Topology.uniform(args.ep, num_nodes=args.nodes)
    started = time.perf_counter()
    placement = chosen.place(profile, ep_size=args.ep, topology=topology)
    solved = time.perf_counter()
    Schedule.from_profile(profile, placement)
    return {
        "layers": layers,
        "mode": mode,
        "nonzeros": sum(table.nnz for table in profile.token_expert),
        "solve_seconds": solved - started,
        "schedule_seconds": time.perf_counter() - solved,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def drawn_profile(
    template: RoutingProfile, *, layers: int, experts: int, top_k: int, vocab: int, seed: int = 0
) -> RoutingProfile:
    """Draw a profile of another size with the shape of a real one.

    Args:
        template: Profile of a real trace.
        layers: MoE layers (L).
        experts: Experts a layer (E).
        top_k: Experts a token activates (K).
        vocab: Token ids (V).
        seed: Seed of the draw.
    """
    rng = np.random.default_rng(seed)
    known = np.sort(template.token_count[template.token_count > 0])[::-1]
    quantile = np.linspace(0, len(known) - 1, vocab)
    frequency = np.interp(quantile, np.arange(len(known)), known)
    count = np.maximum(np.round(frequency * TOKENS / frequency.sum()), 1.0)
    order = np.argsort(-template.token_count, kind="stable")[: len(known)]
    like = order[np.round(quantile).astype(int)]
    tables, load = [], np.zeros((layers, experts))
    for layer in range(layers):
        shape = template.token_expert[layer % template.fingerprint.num_layers]
        rows = sparse.csr_array(shape[like])
        popularity = rng.dirichlet(np.full(experts, 2.0))
        columns = rng.choice(experts, size=rows.nnz, p=popularity)
        owner = np.repeat(np.arange(vocab), np.diff(rows.indptr))
        total = np.asarray(rows.sum(axis=1)).ravel()
        activations = rows.data * (count * top_k / np.maximum(total, 1e-12))[owner]
        table = sparse.csr_array(
            sparse.coo_array((activations, (owner, columns)), shape=(vocab, experts)),
            dtype=np.float32,
        )
        tables.append(table)
        load[layer] = np.asarray(table.sum(axis=0)).ravel()
    together = np.einsum("le,lf->lef", load, load) * (top_k - 1)
    together /= np.maximum(load.sum(axis=1), 1e-12)[:, None, None]
    together[:, np.arange(experts), np.arange(experts)] = 0
    return RoutingProfile(
        fingerprint=ModelFingerprint(
            architecture="drawn",
            layer_ids=tuple(range(layers)),
            num_experts=experts,
            top_k=top_k,
        ),
        load=load,
        token_count=count,
        token_expert=tuple(tables),
        coactivation=together,
        transition=np.zeros((layers - 1, experts, experts)),
        sequence_load=np.zeros((0, layers, experts), dtype=np.float32),
        dropped_mass=np.zeros(layers),
        tokens=float(count.sum()),
    )
