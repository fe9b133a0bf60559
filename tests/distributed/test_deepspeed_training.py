"""DeepSpeed training: recorded counts are exact, exports reload, a dead rank is noticed."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

import torch
from torch import distributed as dist
from torch import nn

from semantic_ep.apply.checkpoint import checkpoint_fingerprint
from semantic_ep.errors import ConfigError, PeerFailureError
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.tracking import Tracker
from tests.distributed.launcher import run_ranks
from tests.wandb_offline import OfflineRun

pytestmark = pytest.mark.distributed

VOCAB, BATCH, LENGTH = 96, 3, 10


def deepspeed_config(output=None, **changes):
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 0},
        "steps_per_print": 10**9,
        "expert_parallel": {"enabled": True, "autoep_size": 2, "use_grouped_mm": False},
        "semantic_ep": {"enabled": output is not None, "observe": {"output": str(output)}},
    }
    return config | changes


def tiny_model(family="qwen3_moe"):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }
    shape |= {
        "qwen3_moe": {
            "num_experts": 8,
            "moe_intermediate_size": 16,
            "head_dim": 16,
            "mlp_only_layers": [1],
            "tie_word_embeddings": True,
        },
        "mixtral": {"num_local_experts": 8},
        "deepseek_v3": {
            "n_routed_experts": 8,
            "moe_intermediate_size": 16,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "n_group": 2,
            "topk_group": 1,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
    }[family]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))


def start(model, config):
    from semantic_ep.integrations.deepspeed import initialize
    from semantic_ep.integrations.deepspeed.inference import init_distributed

    init_distributed(device_type="cpu", peer_timeout=30)
    engine, *_ = initialize(None, model, config=config, model_parameters=model.parameters())
    return engine


def batches(rank, count):
    """Right-padded batches, different on every rank."""
    rng = np.random.default_rng(rank)
    for _ in range(count):
        token_id = torch.from_numpy(rng.integers(2, VOCAB, (BATCH, LENGTH)))
        lengths = torch.from_numpy(rng.integers(4, LENGTH + 1, (BATCH, 1)))
        mask = (torch.arange(LENGTH) < lengths).long()
        yield token_id.masked_fill(mask == 0, 1), mask


class BruteForce:
    """Every route of the passes run inside `watching`, by hooks of its own."""

    def __init__(self, routers, read):
        self.on, self.seen, self.kept = False, [], []
        for router in routers:
            router.register_forward_hook(
                lambda *call: self.seen.append(read(*call).clone()) if self.on else None
            )

    def forward(self, engine, token_id, mask, **inputs):
        self.on, self.seen = True, []
        output = engine(input_ids=token_id, attention_mask=mask, **inputs)
        self.on = False
        routes = torch.stack(self.seen, dim=1).reshape(*token_id.shape, len(self.seen), -1)
        for row in range(len(token_id)):
            real = mask[row].bool()
            self.kept.append((token_id[row][real].numpy(), routes[row][real].numpy()))
        return output

    def profile(self, fingerprint):
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.kept)
        kept = [sequence for rank in everyone for sequence in rank]
        trace = RoutingTrace(
            fingerprint=fingerprint,
            experts=np.concatenate([routes for _, routes in kept]).astype(np.uint8),
            offsets=np.cumsum([0, *(len(ids) for ids, _ in kept)]),
            token_id=np.concatenate([ids for ids, _ in kept]).astype(np.int32),
        )
        return RoutingProfile.from_trace(trace, vocab_size=VOCAB)


def assert_same_counts(profile, expected):
    for name in ("load", "token_count", "coactivation", "transition"):
        np.testing.assert_array_equal(getattr(profile, name), getattr(expected, name), name)
    for mine, theirs in zip(profile.token_expert, expected.token_expert, strict=True):
        np.testing.assert_array_equal(mine.toarray(), theirs.toarray())
    assert profile.tokens == expected.tokens
    assert sorted(map(bytes, profile.sequence_load)) == sorted(map(bytes, expected.sequence_load))


def autoep_routers(engine):
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    return [m.router for m in engine.module.modules() if isinstance(m, AutoEPMoELayer)]


def routes_of_autoep(_router, _args, output):
    return output[1]


def _train_and_record(rank, ranks, output):
    """Accumulation, padding, checkpointed activations, evaluation in between, and a resume."""
    model = tiny_model()
    model.gradient_checkpointing_enable()
    engine = start(model, deepspeed_config(output / "profile"))
    count = BruteForce(autoep_routers(engine), routes_of_autoep)
    for number, (token_id, mask) in enumerate(batches(rank, 6)):
        loss = count.forward(engine, token_id, mask, labels=token_id).loss
        engine.backward(loss)
        engine.step()
        if number % 2:
            engine.eval()
            with torch.no_grad():
                engine(input_ids=token_id, attention_mask=mask)
            engine.train()
    engine.save_checkpoint(str(output / "checkpoint"))
    expected = count.profile(engine.semantic_ep.fingerprint())

    resumed = start(tiny_model(), deepspeed_config(output / "resumed"))
    assert resumed.load_checkpoint(str(output / "checkpoint"))[0] is not None
    again = BruteForce(autoep_routers(resumed), routes_of_autoep)
    again.kept = count.kept
    for token_id, mask in batches(rank + ranks, 2):
        resumed.backward(again.forward(resumed, token_id, mask, labels=token_id).loss)
        resumed.step()
    resumed.save_checkpoint(str(output / "later"))
    return expected, again.profile(resumed.semantic_ep.fingerprint())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    output = tmp_path_factory.mktemp("recorded")
    return output, run_ranks(_train_and_record, 2, output)[0]


def test_the_profile_of_autoep_training_equals_a_brute_force_count(recorded):
    output, (expected, _) = recorded
    profile = RoutingProfile.read(output / "profile")
    assert profile.fingerprint == expected.fingerprint
    assert profile.fingerprint.layer_ids == (0, 2)
    assert_same_counts(profile, expected)


def test_a_checkpoint_carries_the_profile_and_a_resumed_run_continues_it(recorded):
    output, (expected, longer) = recorded
    copy = RoutingProfile.read(output / "checkpoint" / "global_step3" / "routing_profile")
    assert_same_counts(copy, expected)
    assert_same_counts(RoutingProfile.read(output / "resumed"), longer)


def _train_and_track(rank, _ranks, output):
    """DeepSpeed's own W&B section opens the run; the tracker starts after the engine."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": str(output), "WANDB_SILENT": "true"}
    wandb_section = {"enabled": True, "project": "theirs", "group": "nightly"}
    engine = start(tiny_model(), deepspeed_config(output / "profile", wandb=wandb_section))
    with Tracker.start(
        output, config={"semantic": True}, job_type="train", wandb="offline", rank=rank
    ) as tracker:
        for token_id, mask in batches(rank, 4):
            loss = engine(input_ids=token_id, attention_mask=mask, labels=token_id).loss
            engine.backward(loss)
            engine.step()
            tracker.log({"train/loss": loss.item()}, step=engine.micro_steps)
    if rank == 0:
        import wandb

        assert wandb.run is not None, "the tracker closed a run that is DeepSpeed's"
        wandb.finish()


def test_the_run_of_deepspeeds_own_wandb_section_is_joined_and_no_second_one_opened(tmp_path):
    pytest.importorskip("wandb")
    run_ranks(_train_and_track, 2, tmp_path)
    run = OfflineRun.in_directory(tmp_path)  # Fails where there are two.
    assert (run.project, run.group) == ("theirs", "nightly")
    assert run.config["semantic_ep"] == {"semantic": True}
    # Rows are committed by DeepSpeed, once an optimizer step: of several of ours the last is kept.
    assert [row["train/step"] for row in run.history if "train/loss" in row] == [1, 3, 4]
    assert len([row for row in run.history if "Train/Samples/lr" in row]) == 2


def _balance(rank, ranks):
    from semantic_ep.integrations.deepspeed import LoadBalancingLoss

    engine = start(tiny_model(), deepspeed_config())
    balance = LoadBalancingLoss(engine.module, window=4.0)
    inputs = [(router, []) for router in autoep_routers(engine)]
    for router, seen in inputs:
        router.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0].detach()))
    measured, passes = [], []
    for token_id, mask in batches(rank, 3):
        engine(input_ids=token_id, attention_mask=mask)
        measured.append(float(balance.of_last_pass(mask.reshape(-1))))
        passes.append(mask.reshape(-1).bool())
    everyone = [None] * ranks
    dist.all_gather_object(everyone, _probabilities(inputs, passes))
    expected = []
    for number in range(3):
        losses = []
        for layer in range(len(inputs)):
            count = sum(
                0.75 ** (number - past) * _count(probability[layer][past])
                for probability in everyone
                for past in range(number + 1)
            )
            mine = everyone[rank][layer][number].mean(dim=0)
            losses.append(8 * float((count / count.sum() * mine).sum()))
        expected.append(sum(losses) / len(losses))
    assert measured == pytest.approx(expected, rel=1e-5)


def _probabilities(inputs, passes):
    """Layer -> pass -> [real tokens, E]."""
    return [
        [
            (x @ router.gate.weight.T).softmax(dim=1).detach()[mask]
            for x, mask in zip(seen, passes, strict=True)
        ]
        for router, seen in inputs
    ]


def _count(probability_TE):
    return torch.bincount(probability_TE.topk(2, dim=1).indices.reshape(-1), minlength=8).float()


def test_the_balancing_loss_sees_all_ranks_and_recent_passes():
    run_ranks(_balance, 2)


class NativeModel(nn.Module):
    """Embedding and two `deepspeed.moe` layers."""

    def __init__(self):
        from deepspeed.moe.layer import MoE

        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(
            MoE(
                16,
                nn.Linear(16, 16),
                num_experts=4,
                ep_size=2,
                k=2,
                drop_tokens=False,
                top2_2nd_expert_sampling=False,
            )
            for _ in range(2)
        )

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x)[0]
        return x.square().mean()


def best_two(gate, args, _output):
    return (args[0].float() @ gate.wg.weight.T).topk(2, dim=1).indices


def _train_native(rank, ranks, output):
    engine = start(NativeModel(), deepspeed_config(output, expert_parallel={"enabled": False}))
    count = BruteForce([layer.deepspeed_moe.gate for layer in engine.module.layers], best_two)
    for token_id, mask in batches(rank, 4):
        engine.backward(count.forward(engine, token_id, mask))
        engine.step()
    engine.semantic_ep.save()
    return count.profile(engine.semantic_ep.fingerprint())


def test_the_profile_of_native_moe_training_equals_a_brute_force_count(tmp_path):
    expected = run_ranks(_train_native, 2, tmp_path / "profile")[0]
    assert_same_counts(RoutingProfile.read(tmp_path / "profile"), expected)


def _read_both_gate_outputs(rank, ranks):
    from deepspeed.moe.sharded_moe import TopKGate

    from semantic_ep.integrations.deepspeed.observation import _native_experts

    torch.manual_seed(0)
    for k, drop in ((1, False), (2, False), (2, True), (3, True)):
        gate = TopKGate(
            8,
            6,
            k=k,
            drop_tokens=drop,
            capacity_factor=0.6,
            min_capacity=1,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        x = torch.randn(40, 8)
        sparse, dense = (
            _native_experts(gate(x, sparse_routes=form), k).sort(dim=1).values
            for form in (True, False)
        )
        assert torch.equal(sparse, dense), (k, drop)
        assert (sparse < 0).any() == drop


def test_both_outputs_of_the_native_gate_read_the_same():
    run_ranks(_read_both_gate_outputs, 1)


def _export(rank, ranks, output, family, stage):
    from semantic_ep.integrations.deepspeed import save_huggingface_checkpoint

    config = deepspeed_config(zero_optimization={"stage": stage}, gradient_accumulation_steps=1)
    engine = start(tiny_model(family), config)
    token_id, mask = next(batches(rank, 1))
    for _ in range(2):
        engine.backward(engine(input_ids=token_id, attention_mask=mask, labels=token_id).loss)
        engine.step()
    save_huggingface_checkpoint(engine, output, max_shard_bytes=20_000)
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=token_id, attention_mask=mask).logits
    return token_id, mask, logits


@pytest.mark.parametrize(
    ("family", "stage"), [("qwen3_moe", 1), ("qwen3_moe", 3), ("mixtral", 0), ("deepseek_v3", 3)]
)
def test_an_exported_model_reloads_in_transformers_with_equal_logits(tmp_path, family, stage):
    from transformers import AutoModelForCausalLM

    results = run_ranks(_export, 2, tmp_path / "model", family, stage)
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 2
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    checkpoint_fingerprint(tmp_path / "model")  # Complete by our own reader, too.
    for token_id, mask, logits in results:
        with torch.no_grad():
            reloaded = model.eval()(input_ids=token_id, attention_mask=mask).logits
        real = mask.bool()
        torch.testing.assert_close(reloaded[real], logits[real], rtol=1e-5, atol=1e-5)


def _train_until_killed(engine, rank, checkpoint):
    for number, (token_id, mask) in enumerate(batches(rank, 50)):
        if rank == 1 and number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        engine.backward(engine(input_ids=token_id, attention_mask=mask, labels=token_id).loss)
        engine.step()
        if number == 1:
            engine.save_checkpoint(str(checkpoint))


def _die_in_training(rank, ranks, output):
    from semantic_ep.integrations.deepspeed import peers_must_answer

    engine = start(tiny_model(), deepspeed_config(output))
    started = time.monotonic()
    with pytest.raises(PeerFailureError, match="rank 0 stops: another rank died"):  # noqa: SIM117
        with peers_must_answer():
            _train_until_killed(engine, rank, output.parent / "checkpoint")
    return time.monotonic() - started


def test_a_rank_that_dies_stops_the_others_and_leaves_the_last_profile(tmp_path):
    waited = run_ranks(_die_in_training, 2, tmp_path / "profile", dying=[1])
    assert waited[0] < 60
    assert RoutingProfile.read(tmp_path / "profile").meta["steps"] == 1


def _refusals(rank, ranks, output):
    def refused(match, **changes):
        with pytest.raises(ConfigError, match=match):
            start(tiny_model(), deepspeed_config(output, **changes))

    refused("Did you mean", semantic_ep={"enabled": True, "observ": {}})
    refused("both spread", semantic_ep={"enabled": True, "plan": {"artifact": "p"}})
    refused("two settings", semantic_ep={"enabled": True, "groups": {"ep_size": 4}})
    refused("no MoE layer that DeepSpeed runs", expert_parallel={"enabled": False})
    engine = start(tiny_model(), deepspeed_config(output))
    token_id, _ = next(batches(rank, 1))
    with pytest.raises(ConfigError, match="does not tell which tokens are padding"):
        engine(input_ids=token_id, attention_mask=torch.ones(BATCH, 1, LENGTH, LENGTH))
    with pytest.raises(ConfigError, match="without token ids"):
        engine(inputs_embeds=torch.zeros(BATCH, LENGTH, 32))


def test_what_cannot_be_observed_is_refused_with_the_reason(tmp_path):
    run_ranks(_refusals, 2, tmp_path / "profile")


def _correct_choices(rank, ranks, output):
    from deepspeed.module_inject import auto_ep_layer

    model, config = tiny_model("deepseek_v3"), deepspeed_config(output)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.copy_(torch.arange(8.0))
    if hasattr(auto_ep_layer, "_copy_e_score_correction_bias"):  # From 0.19.7.
        for router in autoep_routers(start(model, config)):
            torch.testing.assert_close(router.e_score_correction_bias.cpu(), torch.arange(8.0))
        return
    with pytest.raises(ConfigError, match=r"leaves out model\..*e_score_correction_bias"):
        start(model, config)


def test_the_bias_of_a_router_is_observed_or_refused_where_autoep_leaves_it_out(tmp_path):
    run_ranks(_correct_choices, 2, tmp_path / "profile")


def _without_observation(rank, ranks):
    engine = start(tiny_model(), deepspeed_config())
    ours = [
        hook
        for module in engine.module.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if hook.__module__.startswith("semantic_ep")
    ]
    return engine.semantic_ep, len(ours), type(engine).__module__


def test_a_run_without_the_section_is_plain_deepspeed():
    for observation, hooks, module in run_ranks(_without_observation, 2):
        assert observation is None
        assert hooks == 0
        assert module.startswith("deepspeed")
