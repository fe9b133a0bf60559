import functools
import itertools
import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from semantic_ep.errors import BackendError, CheckpointError, PeerFailureError, RequestError
from semantic_ep.plan.placement import Placement
from semantic_ep.serve.protocol import EngineRequest, SamplingParams
from tests.distributed.launcher import run_ranks

pytestmark = pytest.mark.distributed

EXPERTS, LAYERS, VOCAB = 8, 2, 97

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": LAYERS + 1,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
FAMILIES = {
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 16},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
    "mixtral": {"num_local_experts": EXPERTS},
    "olmoe": {"num_experts": EXPERTS},
    "gpt_oss": {"num_local_experts": EXPERTS, "layer_types": ["full_attention"] * LAYERS},
    "deepseek_v2": {**LATENT_ATTENTION, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**LATENT_ATTENTION, "n_group": 4, "topk_group": 2},
    "glm4_moe": {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "num_hidden_layers": LAYERS + 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}


def save_tiny_model(directory, family, **changes):
    """A random model whose experts differ enough for a wrong one to change the output."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
            elif family == "olmoe":  # Whose norms are cut where heads are sharded.
                parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return functools.cache(lambda family: save_tiny_model(root / family, family))


def contiguous(ep_size):
    return Placement.contiguous(num_layers=LAYERS, num_experts=EXPERTS, ep_size=ep_size)


def placements(ep_size, seed=0):
    """Contiguous, random, uneven (empty slots) and with a replica on every rank."""
    draw = np.random.default_rng(seed)
    even = np.stack([draw.permutation(np.arange(EXPERTS) % ep_size) for _ in range(LAYERS)])
    uneven = even.copy()
    uneven[0, np.flatnonzero(uneven[0] == 1)[0]] = 0
    replicated = np.empty((LAYERS, ep_size, EXPERTS // ep_size + 1), dtype=np.int32)
    for layer in range(LAYERS):
        for rank in range(ep_size):
            own = np.flatnonzero(even[layer] == rank)
            other = draw.choice(np.setdiff1d(np.arange(EXPERTS), own))
            replicated[layer, rank] = [*own, other]
    return {
        "contiguous": contiguous(ep_size),
        "random": Placement.from_rank_of_expert(even, ep_size=ep_size),
        "uneven": Placement.from_rank_of_expert(uneven, ep_size=ep_size),
        "replicated": Placement(
            physical_to_logical_map=replicated.reshape(LAYERS, -1),
            num_experts=EXPERTS,
            ep_size=ep_size,
        ),
    }


def prompts_of(rank):
    """Requests of different lengths; the last rank has none."""
    draw = np.random.default_rng(100 + rank)
    lengths = [(5, 1, 9), (3,), (7, 7, 2, 12, 4), ()][rank]
    return [draw.integers(3, VOCAB, length).tolist() for length in lengths]


def expert_bytes_on_disk(directory):
    from semantic_ep.apply.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(directory)
    routed = [name for name, tensor in checkpoint.experts.items() if not tensor.router]
    return sum(checkpoint.tensors[name].end - checkpoint.tensors[name].begin for name in routed)


def single_process(directory, prompts, max_new_tokens):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        new = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        outputs.append(new[0, len(prompt) :].tolist())
    return outputs


def load(directory, placement):
    from semantic_ep.serve.engine import SemanticInferenceEngine

    return SemanticInferenceEngine.from_checkpoint(
        directory, placement=placement, group=dist.group.WORLD
    )


def _serve(rank, ranks, directory):
    prompts, new_tokens = prompts_of(rank), 6
    want = single_process(directory, prompts, new_tokens)
    held = {}
    for name, placement in placements(ranks).items():
        engine = load(directory, placement)
        got = engine.generate(prompts, max_new_tokens=new_tokens, max_batch_size=3)
        assert got.outputs == want, name
        stats = engine.model.dispatcher.stats
        # Each prompt token and each new token but the last passes every layer exactly once.
        tokens = sum(map(len, prompts)) + sum(len(output) - 1 for output in want)
        assert stats.tokens.tolist() == [tokens] * LAYERS
        assert stats.activations.sum(axis=1).tolist() == [2 * tokens] * LAYERS
        held[name] = engine.expert_bytes_resident
    return held


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_tokens_equal_one_process_under_every_placement(models, family):
    held = run_ranks(_serve, 4, models(family))
    everything = expert_bytes_on_disk(models(family))
    for rank in held:
        assert rank["contiguous"] == rank["random"] == everything // 4
        assert rank["replicated"] == everything * 3 // 8


WINDOWED = {
    "mixtral": {"sliding_window": 4},
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "gpt_oss": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
}


def _serve_each(rank, ranks, directories):
    prompts, new_tokens = [*prompts_of(0), *prompts_of(2)], 6
    crowded = []
    for name, directory in directories.items():
        want = single_process(directory, prompts, new_tokens)
        engine = load(directory, contiguous(ranks))
        for together in (1, 5):
            got = engine.generate(prompts, max_new_tokens=new_tokens, max_batch_size=together)
            assert got.outputs == want, (name, together)
        if ranks == 1:
            crowded.append(
                _serve_in_little_room(engine, [*prompts, [5] * 13], new_tokens, directory)
            )
    # Some models end their requests before there is a lack of blocks.
    assert ranks > 1 or all(map(any, zip(*crowded, strict=True)))


def _serve_in_little_room(engine, prompts, new_tokens, directory):
    """Requests that arrive one after another, with chunks, pre-emptions and scattered blocks."""
    want = single_process(directory, prompts, new_tokens)
    worker = engine.worker(kv_cache_tokens=28, block_size=2, max_sequences=4, max_step_tokens=7)
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0)
    outputs, arriving, scattered = [[] for _ in prompts], list(enumerate(prompts)), False
    while arriving or worker.batcher:
        if arriving:
            number, prompt = arriving.pop(0)
            request = EngineRequest(id=str(number), prompt_token_ids=prompt, sampling=sampling)
            worker.add(request)
        for event in worker.step():
            outputs[int(event.request_id)] += event.token_ids
        held = [sequence.blocks for sequence in worker.batcher._running]
        scattered |= any(b - a != 1 for blocks in held for a, b in itertools.pairwise(blocks))
    assert outputs == want, directory
    return worker.batcher.preemptions, scattered


def test_one_rank_alone_generates_the_same_tokens_for_every_family(models, tmp_path):
    directories = {family: models(family) for family in FAMILIES}
    windowed = {
        f"{family}-windowed": save_tiny_model(tmp_path / family, family, **changes)
        for family, changes in WINDOWED.items()
    }
    run_ranks(_serve_each, 1, directories | windowed)


def test_sliding_windows_and_attention_sinks_are_kept(tmp_path):
    directories = {
        family: save_tiny_model(tmp_path / family, family, **changes)
        for family, changes in WINDOWED.items()
    }
    run_ranks(_serve_each, 2, directories)


def _refusals(rank, ranks, directory):
    from semantic_ep.apply.checkpoint import Checkpoint
    from semantic_ep.errors import PlacementError

    with pytest.raises(BackendError, match="plan is for 2 ranks and the EP group has 1"):
        load(directory, contiguous(2))
    other = Placement.contiguous(num_layers=LAYERS, num_experts=2 * EXPERTS, ep_size=1)
    with pytest.raises(PlacementError, match="got 2 MoE layers of 16 experts"):
        load(directory, other)
    engine = load(directory, contiguous(1))
    for prompt, message in (([], "at least 1 token"), ([5] * 60, "too long.*64 in all")):
        with pytest.raises(RequestError, match=message):
            engine.generate([[4], prompt], max_new_tokens=8)
    checkpoint = Checkpoint.open(directory)
    checkpoint.config["quantization_config"] = {"quant_method": "mxfp4"}
    with pytest.raises(CheckpointError, match=r"quantised.*mxfp4"):
        load(checkpoint, contiguous(1))


def test_what_cannot_be_served_is_refused_with_the_reason(models):
    run_ranks(_refusals, 1, models("qwen3_moe"))


def _die_while_serving(rank, ranks, directory):
    engine = load(directory, placements(ranks)["random"])
    if rank == 1:
        steps = iter(range(3))

        def die_at_the_third_step(_):
            if next(steps) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        engine.generate([[5, 6, 7]], max_new_tokens=50, on_tokens=die_at_the_third_step)
    start = time.monotonic()
    with pytest.raises(PeerFailureError, match="another rank of the group died"):
        engine.generate([[5, 6, 7]], max_new_tokens=50)
    return time.monotonic() - start


def test_a_rank_killed_while_serving_stops_the_others_at_once(models):
    waited = run_ranks(_die_while_serving, 4, models("qwen3_moe"), dying=[1])
    assert all(seconds < 20 for rank, seconds in enumerate(waited) if rank != 1)
