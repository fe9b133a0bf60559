"""Pipeline stages tell each other what each needs to count its own MoE layers."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import BackendError
from semantic_ep.integrations.stages import StageExchange
from semantic_ep.observe.recorder import RoutingRecorder
from tests.distributed.launcher import run_ranks

pytestmark = pytest.mark.distributed


def _dense_first_stage(rank, world_size):
    """Three stages by hand: the first has no MoE layer, the others have one each."""
    layers = ((), (0,), (1,))[rank]
    stages = StageExchange(dist.group.WORLD, layers, top_k=1)
    recorder = RoutingRecorder(
        num_layers=2,
        num_experts=4,
        top_k=1,
        vocab_size=9,
        layers=layers,
        counts_tokens=rank == 0,
        complete=stages.complete,
    )
    token_id, mask = torch.tensor([7, 8, 7]), torch.tensor([True, True, False])
    experts = {0: torch.tensor([[3], [1], [0]]), 1: torch.tensor([[2], [0], [0]])}
    for _ in range(2):
        if rank == 0:
            recorder.start_micro_batch(token_id, mask_T=mask)
        else:
            recorder.start_micro_batch()
        for layer in layers:
            recorder.record(layer, experts[layer])
        recorder.ignore_pass()
    recorder.step()
    fingerprint = ModelFingerprint(architecture="gpt", layer_ids=(4, 5), num_experts=4, top_k=1)
    profile = recorder.profile(fingerprint, group=dist.group.WORLD)
    if rank != 1:  # One stage forgets a pass.
        recorder.start_micro_batch(token_id)
        for layer in layers:
            recorder.record(layer, experts[layer])
    with pytest.raises(BackendError, match="stage 0: 1, stage 1: 0, stage 2: 1"):
        recorder.step()
    return profile and (profile.tokens, profile.transition.tolist(), profile.load.tolist())


def test_stages_without_moe_layers_give_their_token_ids_all_the_same():
    tokens, transition, load = run_ranks(_dense_first_stage, 3)[0]
    assert tokens == 4
    assert load == [[0, 2, 0, 2], [2, 0, 2, 0]]
    assert transition[0][3][2] == transition[0][1][0] == 2
    assert np.sum(transition) == 4
