"""Our exchange in the place of Megatron's alltoall: the same losses, and fewer bytes."""

import functools
from importlib.util import find_spec

import numpy as np
import pytest
import torch.distributed as dist

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from semantic_ep.config import SemanticEPConfig
from tests.distributed import megatron_tiny as tiny
from tests.distributed.launcher import run_ranks
from tests.distributed.megatron_tiny import Trainer

pytestmark = pytest.mark.distributed

ROWS = np.stack([np.random.default_rng(layer).permutation(tiny.EXPERTS) for layer in range(2)])
STEPS = 5


class _Sent:
    """Bytes that this rank sends to others in all-to-all exchanges, whoever calls them."""

    def __init__(self):
        self.bytes = 0
        self._theirs = dist.all_to_all_single
        dist.all_to_all_single = self._count

    def _count(self, output, input, output_split_sizes=None, input_split_sizes=None, **options):
        group = options.get("group")
        own = (
            len(input) // dist.get_world_size(group)
            if input_split_sizes is None
            else input_split_sizes[dist.get_rank(group)]
        )
        row = input[:1].nelement() * input.element_size()
        self.bytes += (len(input) - int(own)) * row
        return self._theirs(output, input, output_split_sizes, input_split_sizes, **options)

    def take(self):
        taken, self.bytes = self.bytes, 0
        return taken


def _ours(config):
    """What `--semantic-ep-dispatch-backend torch` makes, without a plan."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from semantic_ep.integrations.megatron import SemanticRun

    settings = SemanticEPConfig.resolve(
        json_section={"enabled": True, "dispatch": {"backend": "torch"}}, environment={}
    )
    run = SemanticRun.prepare(settings, config, vocab_size=tiny.VOCAB)
    spec = get_gpt_layer_local_spec(
        num_experts=tiny.EXPERTS, moe_grouped_gemm=False, normalization="RMSNorm"
    )
    layer = run.place(spec).submodules.mlp
    given = layer.keywords if isinstance(layer, functools.partial) else layer.params
    assert run.placed is None
    assert given["exchange"] is run.exchange
    assert given["placed"].slots_of(1).tolist() == list(range(tiny.EXPERTS))
    return run


def _runs(rank, world_size, directory, settings, distributed_optimizer):
    """(losses, bytes sent) under Megatron's dispatcher, ours, and ours with placed experts."""
    tiny.start(expert_parallel=world_size)
    sent, results, counted = _Sent(), [], []
    for rows in (None, np.tile(np.arange(tiny.EXPERTS), (2, 1)), ROWS):
        config = tiny.config(moe_router_topk=4, **settings)
        exchange = None if rows is None else _ours(config).exchange
        trainer = Trainer.build(
            config,
            rows,
            exchange=exchange,
            distributed_optimizer=distributed_optimizer,
            # Steps in proportion to gradients: Adam's own make much of the order of sums.
            adam_eps=1e-2,
        )
        if rows is None:
            # Before the first step there is no state of the optimizer to load.
            trainer.step([tiny.batch(0, rank)])
            trainer.save(directory)
        trainer.load(directory)
        sent.take()
        losses = [
            loss
            for step in range(STEPS)
            for loss in trainer.step([tiny.batch(micro, rank) for micro in range(2)])
        ]
        results.append((losses, sent.take()))
        if exchange is not None:
            counted.append(exchange.dispatcher.stats.tokens.tolist())
    return results, counted


@pytest.mark.parametrize(
    ("ranks", "settings", "distributed_optimizer"),
    [
        (2, {}, True),
        # Tokens beyond a capacity are dropped, and every forward pass runs twice.
        (
            4,
            {
                "moe_expert_capacity_factor": 1.0,
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
            False,
        ),
    ],
)
def test_our_exchange_has_the_losses_of_megatrons_alltoall_and_sends_fewer_bytes(
    tmp_path, ranks, settings, distributed_optimizer
):
    arguments = (tmp_path / "start", settings, distributed_optimizer)
    results = run_ranks(_runs, ranks, *arguments, timeout=400)
    for ((theirs, _), *ours), counted in results:
        assert theirs[-2] < theirs[0] - 0.01
        for losses, _ in ours:
            np.testing.assert_allclose(losses, theirs, atol=1e-5)
        if not settings:
            tokens = STEPS * 2 * tiny.BATCH * tiny.SEQUENCE
            assert counted == [[tokens, tokens]] * 2
    their_bytes, *our_bytes = np.sum([[sent for _, sent in runs] for runs, _ in results], axis=0)
    # Rows are of 128 bytes here, to which routes add 32.
    assert max(our_bytes) < 0.95 * their_bytes


def _refusals(rank, world_size):
    from semantic_ep.errors import BackendError, ConfigError
    from semantic_ep.integrations.megatron.dispatcher import Exchange

    tiny.start()
    rows, messages = np.tile(np.arange(tiny.EXPERTS), (2, 1)), []
    for setting in ("moe_pad_expert_input_to_capacity", "moe_shared_expert_overlap"):
        config = tiny.config(moe_expert_capacity_factor=1.0)
        setattr(config, setting, True)
        with pytest.raises(ConfigError) as caught:
            tiny.model(config, rows, exchange=Exchange("torch", num_layers=2))
        messages.append(str(caught.value))
    with pytest.raises(BackendError) as caught:
        tiny.model(tiny.config(), rows, exchange=Exchange("deepep", num_layers=2))
    messages.append(str(caught.value))
    return messages


def test_what_only_megatrons_dispatchers_do_is_refused_with_the_reason():
    for message, fragment in zip(
        run_ranks(_refusals, 2)[0],
        ["--moe-pad-expert-input-to-capacity", "--moe-shared-expert-overlap", "is not available"],
        strict=True,
    ):
        assert fragment in message


def _flex(rank, world_size):
    """Build a placed model whose flex dispatcher only records how it is made."""
    import torch
    from megatron.core.transformer.moe import moe_layer

    tiny.start()
    built = []

    class Recorder(moe_layer.MoEFlexTokenDispatcher):
        def __init__(self, num_local_experts, local_expert_indices, *, config, pg_collection):
            built.append((self, num_local_experts, local_expert_indices, config, pg_collection.ep))

    theirs, moe_layer.MoEFlexTokenDispatcher = moe_layer.MoEFlexTokenDispatcher, Recorder
    config = tiny.config(moe_token_dispatcher_type="flex")
    before = dict(vars(config))
    model = tiny.model(config, ROWS)
    moe_layer.MoEFlexTokenDispatcher = theirs
    assert vars(config) == before
    for layer, each, rows in zip(model.decoder.layers, built, ROWS, strict=True):
        dispatcher, experts, indices, its_config, group = each
        assert layer.mlp.token_dispatcher is dispatcher
        assert (experts, indices) == (4, list(range(4 * rank, 4 * rank + 4)))
        assert its_config.moe_token_dispatcher_type == "flex"
        assert group is layer.mlp.ep_group
        # It is handed routes to slots, as the others are.
        hidden = torch.randn(tiny.SEQUENCE, 1, 32)
        _, routed = layer.mlp.route(hidden)
        _, logical = layer.mlp.router(hidden)
        assert torch.equal(routed, logical[:, rows])


def test_megatrons_flex_dispatcher_is_built_as_megatron_builds_it_and_gets_slots():
    run_ranks(_flex, 2)


@pytest.mark.skipif(find_spec("deep_ep") is None, reason="flex runs on deep_ep, which needs GPUs")
def test_the_flex_dispatcher_starts_where_deep_ep_is():
    run_ranks(_start_flex, 2)


def _start_flex(rank, world_size):
    from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher

    tiny.start()
    model = tiny.model(tiny.config(moe_token_dispatcher_type="flex"), ROWS)
    assert type(model.decoder.layers[0].mlp.token_dispatcher) is MoEFlexTokenDispatcher
