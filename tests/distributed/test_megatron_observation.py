"""Profiles of Megatron runs equal a count by hand, however the run is spread over ranks."""

import dataclasses
import inspect
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from tests.distributed import megatron_tiny as tiny
from tests.distributed.launcher import run_ranks
from tests.distributed.test_megatron_copies import ON_TWO, with_copies

pytestmark = pytest.mark.distributed

PAD = 0
GROUPS, GROUPS_OF_TOKEN = 4, 2
ROWS = np.stack([np.random.default_rng(layer).permutation(tiny.EXPERTS) for layer in range(4)])


@dataclasses.dataclass(frozen=True)
class Case:
    """How a run is spread over its ranks, and what else makes counting difficult."""

    ranks: int = 2
    tensor: int = 1
    pipeline: int = 1
    interleaved: int | None = None
    context: int = 1
    layers: int = 2
    recompute: bool = False
    placed: bool = False
    copied: bool = False
    graphed: bool = False
    grouped: bool = False

    @property
    def sample_tokens(self):
        """More than there are where no rank sees all layers, which is what makes it difficult."""
        return 10**6 if self.pipeline > 1 else 0

    @property
    def fingerprint(self):
        return ModelFingerprint(
            architecture="gpt",
            layer_ids=tuple(range(self.layers)),
            num_experts=tiny.EXPERTS,
            top_k=tiny.TOP_K,
        )


def _batch(step, data_rank):
    """A whole batch of packed rows: the second sequence of each starts at another place."""
    batch = tiny.batch(step, data_rank)
    for row, cut in enumerate((5, 8, 11)):
        batch["position_ids"][row, cut:] -= cut
    return batch


def _on_this_rank(batch):
    """The batch as Megatron's data loaders give it out: later stages get no token ids."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    options = {}
    if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters:
        # From 0.18 on it is told what it found out before.
        options["is_hybrid_cp"] = False
        options["cp_group"] = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(dict(batch), **options)
    if not parallel_state.is_pipeline_first_stage():
        batch |= {"input_ids": None, "position_ids": None}
    return batch


def _routes_by_hand(trainer, wholes):
    """(micro-batch, row, place) -> {layer: experts} of the tokens that this rank's routers see."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_layer import MoELayer

    layers = [each for each in trainer.model.modules() if isinstance(each, MoELayer)]
    seen = {layer: [] for layer in layers}
    handles = [
        layer.router.register_forward_pre_hook(
            lambda _, args, layer=layer: seen[layer].append(args[0])
        )
        for layer in layers
    ]
    trainer.evaluate([_on_this_rank(whole) for whole in wholes])
    for handle in handles:
        handle.remove()
    context = parallel_state.get_context_parallel_world_size()
    places = tiny.places_on_rank(
        tiny.SEQUENCE // context, parallel_state.get_context_parallel_rank(), context
    ).chunk(parallel_state.get_tensor_model_parallel_world_size())
    places = places[parallel_state.get_tensor_model_parallel_rank()].tolist()
    routes = {}
    for layer, passes in seen.items():
        for micro, hidden_SBD in enumerate(passes):
            chosen_SBK = _chosen(layer.router, hidden_SBD).tolist()
            for place, chosen_BK in zip(places, chosen_SBK, strict=True):
                for row, chosen in enumerate(chosen_BK):
                    routes.setdefault((micro, row, place), {})[layer.layer_number - 1] = chosen
    return routes


def _chosen(router, hidden_SBD):
    """[S, B, K] experts as the definition of the router has it."""
    score_SBE = hidden_SBD @ router.weight.T
    if router.expert_bias is not None:  # Also limited to groups, judged by their best expert.
        score_SBE = score_SBE.sigmoid() + router.expert_bias
        by_group = score_SBE.unflatten(2, (GROUPS, -1))
        kept = by_group.amax(3).topk(GROUPS_OF_TOKEN).indices
        allowed = torch.zeros(by_group.shape[:3]).scatter(2, kept, 1.0)[..., None] > 0
        score_SBE = by_group.masked_fill(~allowed, -torch.inf).flatten(2)
    return score_SBE.topk(tiny.TOP_K).indices


def _run(rank, world_size, directory, case):
    from megatron.core import parallel_state

    from semantic_ep.config.sections import ObserveConfig
    from semantic_ep.integrations.megatron import ModelObservation

    tiny.start(
        tensor_parallel=case.tensor,
        pipeline_parallel=case.pipeline,
        interleaved=case.interleaved,
        context_parallel=case.context,
    )
    changes = {"num_layers": case.layers}
    if case.recompute:
        changes |= {"recompute_granularity": "full", "recompute_method": "uniform"}
        changes["recompute_num_layers"] = 1
    if case.grouped:
        changes |= {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_num_groups": GROUPS,
            "moe_router_group_topk": GROUPS_OF_TOKEN,
            "moe_router_load_balancing_type": "none",
        }
    if case.copied:
        trainer = with_copies(tiny.config(**changes), ON_TWO)
    else:
        rows = ROWS[: case.layers] if case.placed else None
        trainer = tiny.Trainer.build(tiny.config(**changes), rows)
    if case.grouped:
        for module in trainer.model.modules():
            if getattr(module, "expert_bias", None) is not None:
                draw = torch.Generator().manual_seed(5)
                module.expert_bias.copy_(0.2 * torch.randn(tiny.EXPERTS, generator=draw))
    if case.graphed:  # As a run with graphs is observed, although none is captured on a CPU.
        for module in trainer.model.modules():
            if hasattr(module, "pg_collection"):
                module.config.cuda_graph_impl = "local"

    def observe():
        return ModelObservation(
            trainer.parts,
            ObserveConfig(output=str(directory / "profile"), sample_tokens=case.sample_tokens),
            fingerprint=case.fingerprint,
            vocab_size=tiny.VOCAB,
            pad_token_id=PAD,
        )

    observation = observe()
    data_rank = parallel_state.get_data_parallel_rank()
    tokens = {}
    for step in range(3):
        wholes = [_batch(10 * step + micro, data_rank) for micro in range(4)]
        # Counted by hand in an evaluation just before the step, which the profile must not see.
        for (micro, row, place), routes in _routes_by_hand(trainer, wholes).items():
            token_id = wholes[micro]["input_ids"][row, place].item()
            start = place - wholes[micro]["position_ids"][row, place].item()
            tokens[data_rank, step, micro, row, start, place] = (token_id, routes)
        trainer.step([_on_this_rank(whole) for whole in wholes])
        observation.step()
        if step == 1:  # An interruption, after which the counts go on from the checkpoint.
            observation.save(directory / "checkpoint")
            dist.barrier()
            observation.detach()
            observation = observe()
            observation.restore(directory / "checkpoint")
    hashes = [None] * world_size
    dist.all_gather_object(hashes, observation.fingerprint().router_sha256)
    assert len(set(hashes)) == 1
    observation.save()
    everyone = [None] * world_size
    dist.all_gather_object(everyone, tokens)
    return everyone


def _trace_by_hand(everyone, fingerprint):
    """All tokens but padding, each with its routes from all ranks and stages."""
    routes, token_ids = {}, {}
    for tokens in everyone:
        for where, (token_id, by_layer) in tokens.items():
            if token_id != PAD:
                token_ids[where] = token_id
                routes.setdefault(where, {}).update(by_layer)
    order = sorted(routes)
    sequences = [where[:-1] for where in order]
    starts = [i for i in range(len(order)) if i == 0 or sequences[i] != sequences[i - 1]]
    return RoutingTrace(
        fingerprint=fingerprint,
        experts=np.array(
            [[routes[where][layer] for layer in fingerprint.layer_ids] for where in order], np.uint8
        ),
        offsets=np.array([*starts, len(order)], np.int64),
        token_id=np.array([token_ids[where] for where in order], np.int32),
        requests=tuple({"step": sequences[i][1]} for i in starts),
    )


@pytest.mark.parametrize(
    "case",
    [
        Case(grouped=True),
        Case(tensor=2, recompute=True, placed=True),
        Case(tensor=2, recompute=True, copied=True),
        Case(ranks=4, pipeline=2, layers=4, recompute=True, placed=True),
        Case(ranks=4, pipeline=2, interleaved=2, layers=4, recompute=True, graphed=True),
        Case(ranks=4, context=2),
    ],
    ids=["data", "sequence", "copies", "pipeline", "interleaved", "context"],
)
def test_a_profile_counts_every_training_token_once_with_its_logical_experts(tmp_path, case):
    everyone = run_ranks(_run, case.ranks, tmp_path, case, timeout=300)[0]
    trace = _trace_by_hand(everyone, case.fingerprint)
    expected = RoutingProfile.from_trace(trace, vocab_size=tiny.VOCAB)
    profile = RoutingProfile.read(tmp_path / "profile")
    assert profile.tokens == expected.tokens
    for name in ("load", "token_count", "coactivation", "transition"):
        np.testing.assert_array_equal(getattr(profile, name), getattr(expected, name), name)
    for mine, theirs in zip(profile.token_expert, expected.token_expert, strict=True):
        np.testing.assert_array_equal(mine.toarray(), theirs.toarray())

    def sequences(loads):
        return sorted(loads.reshape(len(loads), -1).tolist())

    # Whole ones, although no rank may see more than a part of their tokens or layers.
    assert sequences(profile.sequence_load) == sequences(expected.sequence_load)

    def requests(trace):
        return sorted(
            (trace.token_id[start:end].tolist(), np.sort(trace.experts[start:end]).tolist())
            for start, end in itertools.pairwise(trace.offsets)
        )

    if case.sample_tokens:  # Kept in memory only: from the interruption on.
        later = [row for row, of in enumerate(trace.requests) if of["step"] == 2]
        sample = RoutingTrace.load(tmp_path / "profile-sample")
        assert requests(sample) == requests(trace.select_requests(later))
