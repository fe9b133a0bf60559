"""Routers inside CUDA graphs: what a replay writes is counted, once and only in training."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import BackendError
from semantic_ep.integrations.observation import experts_of_map
from semantic_ep.observe.recorder import RoutingRecorder

LAYERS, EXPERTS, TOP_K, VOCAB, TOKENS, WIDTH = 2, 6, 2, 11, 9, 4
FINGERPRINT = ModelFingerprint(
    architecture="toy", layer_ids=tuple(range(LAYERS)), num_experts=EXPERTS, top_k=TOP_K
)


class Tape(TorchDispatchMode):
    """What a CUDA graph keeps of a function: operations, on tensors that stay where they are.

    Values that the host would have to wait for cannot be captured.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal")
        assert not any(name in func.name() for name in waits), f"{func} waits for the device"
        found = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, found))
        return found

    def replay(self):
        for func, args, kwargs, found in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Captured:
    """A function of one tensor, captured once and then replayed with other values."""

    def __init__(self, function, static, device):
        self.static = static
        if device == "cpu":
            with Tape() as tape:
                function(static)
            self.replay = tape.replay
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function(static)
            self.replay = graph.replay

    def __call__(self, values):
        self.static.copy_(values)
        self.replay()


def cuda():
    missing = "CUDA graphs need a GPU"
    return pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=missing)
    )


def make(device):
    """A recorder, and routers that tell it their routes: (recorder, forward, routes by hand)."""
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(WIDTH, EXPERTS, generator=draw).to(device) for _ in range(LAYERS)]
    recorder = RoutingRecorder(
        num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, vocab_size=VOCAB, graph_safe=True
    )
    calls = []

    def forward(x_TD):
        for layer, weight in enumerate(weights):
            calls.append(layer)
            score_TE = x_TD @ weight
            routed_TE = torch.zeros_like(score_TE).scatter(1, score_TE.topk(TOP_K).indices, 1)
            recorder.record(layer, experts_of_map(routed_TE.bool(), TOP_K))

    def by_hand(x_TD):
        return [(x_TD @ weight).topk(TOP_K).indices.cpu() for weight in weights]

    return recorder, forward, by_hand, calls


@pytest.mark.parametrize("device", ["cpu", cuda()])
def test_replayed_passes_are_counted_exactly(device):
    recorder, forward, by_hand, calls = make(device)
    draw = torch.Generator().manual_seed(1)
    load = torch.zeros(LAYERS, EXPERTS)
    token_count = torch.zeros(VOCAB)

    def inputs():
        return torch.randn(TOKENS, WIDTH, generator=draw).to(device)

    def training(run):
        x_TD, token_id_T = inputs(), torch.randint(VOCAB, (TOKENS,), generator=draw)
        mask_T = torch.rand(TOKENS, generator=draw) < 0.7
        recorder.start_micro_batch(token_id_T.to(device), mask_T=mask_T.to(device))
        run(x_TD)
        recorder.ignore_pass()
        token_count.add_(torch.bincount(token_id_T[mask_T], minlength=VOCAB))
        for layer, chosen_TK in enumerate(by_hand(x_TD)):
            load[layer] += torch.bincount(chosen_TK[mask_T].flatten(), minlength=EXPERTS)

    training(forward)  # The first step runs as it is; graphs are captured after it.
    recorder.step()
    replayed = Captured(forward, inputs(), device)
    called = len(calls)
    for _ in range(3):
        for _ in range(2):
            training(replayed)
        replayed(inputs())  # An evaluation: no micro-batch is open.
        recorder.step()
    assert len(calls) == called, "a replay ran Python"
    profile = recorder.profile(FINGERPRINT)
    assert profile.load.tolist() == load.tolist()
    assert profile.token_count.tolist() == token_count.tolist()
    assert profile.transition.sum() == profile.tokens * TOP_K**2


def test_a_layer_that_runs_twice_in_a_pass_is_an_error():
    recorder, forward, _, _ = make("cpu")
    recorder.start_micro_batch(torch.zeros(TOKENS, dtype=torch.long))
    forward(torch.ones(TOKENS, WIDTH))
    forward(torch.ones(TOKENS, WIDTH))
    with pytest.raises(BackendError, match="layer 0 ran 2 times"):
        recorder.step()


def test_passes_of_another_length_have_tensors_of_their_own():
    recorder, forward, _, _ = make("cpu")
    for tokens in (TOKENS, 4, TOKENS):
        recorder.start_micro_batch(torch.zeros(tokens, dtype=torch.long))
        forward(torch.ones(tokens, WIDTH))
    recorder.step()
    assert recorder.profile(FINGERPRINT).load.sum() == (2 * TOKENS + 4) * LAYERS * TOP_K
