"""What the Megatron integration and its seams rely on, held against the installed release."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from semantic_ep.patches import registry

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("megatron.core", reason="megatron-core is not installed")

pytestmark = pytest.mark.upstream

PATCHES = Path(registry.__file__).parent
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="seams for CPU are inactive here")


def parameters(target):
    return set(inspect.signature(target).parameters)


def parameters_in_order(target):
    return tuple(inspect.signature(target).parameters)


@pytest.fixture
def seams():
    yield registry.apply("megatron")
    registry.revert("megatron")


@cpu_only
def test_torch_stays_as_it_is_for_everyone_but_megatron(seams):
    assert "megatron.cpu.zeros" in seams
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()
    assert torch.zeros(1).type() == "torch.FloatTensor"


@cpu_only
def test_reverting_leaves_no_wrapper_behind():
    registry.apply("megatron")
    registry.revert("megatron")
    for seam in registry.seams("megatron"):
        owner, attribute = registry.resolve(seam.target)
        assert "semantic_ep" not in getattr(getattr(owner, attribute, None), "__module__", "") or ""


@cpu_only
def test_an_unmodified_script_gets_the_seams_when_it_imports_megatron():
    code = (
        "import torch, megatron.core\n"
        "from megatron.core.utils import GlobalMemoryBuffer\n"
        "print(GlobalMemoryBuffer().get_tensor((2,), torch.float32, 'x').device)"
    )
    environment = os.environ | {
        "PYTHONPATH": str(PATCHES / "autoload"),
        "SEMANTIC_EP_AUTOLOAD": "megatron",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "cpu", done.stderr


@cpu_only
def test_models_that_others_build_on_the_meta_device_are_not_touched():
    pytest.importorskip("transformers", reason="transformers is not installed")
    # In a process of its own: torch fills its table of factories once.
    code = """
import tempfile, torch, semantic_ep.patches
semantic_ep.patches.apply("megatron")
with torch.device("meta"):
    made = [torch.empty(2), torch.empty_like(torch.empty(2)), torch.ones(2), torch.zeros(2)]
    assert all(x.is_meta for x in [*made, torch.tensor([1.0])])
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
model = MixtralForCausalLM(MixtralConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
)).eval()
with tempfile.TemporaryDirectory() as directory:
    model.save_pretrained(directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory).eval()
ids = torch.arange(16)[None]
print((model(ids).logits - loaded(ids).logits).abs().max().item())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1:] == ["0.0"], done.stderr


def test_the_moe_layer_has_the_methods_that_the_placed_one_extends():
    from megatron.core.transformer.moe.moe_layer import MoELayer

    assert {"config", "submodules", "layer_number", "pg_collection"} <= parameters(MoELayer)
    assert {"hidden_states", "padding_mask"} <= parameters(MoELayer.route)
    assert list(parameters(MoELayer.set_layer_number) - {"self"}) == ["layer_number"]
    assert {"prefix", "sharded_offsets", "metadata"} <= parameters(MoELayer.sharded_state_dict)


def test_the_dispatcher_has_the_steps_that_ours_takes_the_place_of():
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

    from semantic_ep.integrations.megatron.dispatcher import SemanticTokenDispatcher

    assert {"config", "pg_collection"} <= parameters(MoETokenDispatcher)
    steps = [
        name
        for name, step in vars(MoETokenDispatcher).items()
        if getattr(step, "__isabstractmethod__", False)
    ]
    assert len(steps) == 6
    for name in steps:
        ours = parameters_in_order(getattr(SemanticTokenDispatcher, name))
        assert ours == parameters_in_order(getattr(MoETokenDispatcher, name)), name


def test_sharded_entries_carry_the_fields_that_are_relabelled():
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedTensor,
        ShardedTensorFactory,
    )

    relabelled = {"key", "global_offset", "global_shape", "replica_id"}
    assert {*relabelled, "axis_fragmentations"} <= parameters(ShardedTensor)
    assert relabelled <= parameters(ShardedObject)
    assert {"key", "build_fn"} <= parameters(ShardedTensorFactory)


def test_gradients_of_copies_are_found_where_they_are_summed():
    from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.transformer.module import param_is_not_shared

    assert parameters_in_order(finalize_model_grads)[0] == "model"
    assert "finalize_model_grads_func" in parameters(ModelParallelConfig)
    assert list(parameters(DistributedOptimizer._build_gbuf_range_map)) == ["param_and_grad_buffer"]
    buffers = inspect.getsource(DistributedDataParallel.__init__)
    for name in ("expert_parallel_buffers", "ep_group", "expt_dp_group", "ddp_config"):
        assert f"self.{name}" in buffers, name
    weight = torch.nn.Parameter(torch.zeros(1))
    assert param_is_not_shared(weight)
    weight.shared = True
    assert not param_is_not_shared(weight)


def test_the_layer_spec_describes_its_moe_layer_in_a_form_that_is_understood():
    import functools

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.spec_utils import ModuleSpec

    from semantic_ep.integrations.megatron import PlacedLayers, SemanticMoELayer, place_experts
    from semantic_ep.plan.placement import Placement

    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False, normalization="RMSNorm")
    placed = PlacedLayers(
        placement=Placement.contiguous(num_layers=1, num_experts=4, ep_size=2), layer_ids=(0,)
    )

    def built(layer):
        mlp = layer.submodules.mlp
        return mlp.func if isinstance(mlp, functools.partial) else mlp.module

    assert isinstance(spec, ModuleSpec)
    assert built(place_experts(spec, placed)) is SemanticMoELayer
    assert built(spec) is MoELayer


def test_a_spec_without_an_moe_layer_is_refused_before_there_are_groups_too():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from semantic_ep.errors import ConfigError
    from semantic_ep.integrations.megatron import PlacedLayers, place_experts
    from semantic_ep.plan.placement import Placement

    placed = PlacedLayers(
        placement=Placement.contiguous(num_layers=1, num_experts=4, ep_size=2), layer_ids=(0,)
    )
    dense = get_gpt_layer_local_spec(normalization="RMSNorm")
    for spec in (dense, TransformerBlockSubmodules(layer_specs=[dense])):
        with pytest.raises(ConfigError, match="no MoE layer to place"):
            place_experts(spec, placed)


def test_groups_in_the_order_of_ranks_are_those_of_the_installed_release():
    from megatron.core import parallel_state

    from semantic_ep.runtime.grid import DENSE_KINDS, EXPERT_KINDS
    from semantic_ep.runtime.groups import GroupPlan

    signature = inspect.signature(parallel_state.initialize_model_parallel)
    order = signature.parameters["order"].default
    # Each of the two grids has a generator of its own, in which its axes have the short names.
    short = {"expt_tp": "tp", "expt_dp": "dp"}

    def theirs(axes, **sizes):
        generator = parallel_state.RankGenerator(order=order, **sizes)
        return generator.get_ranks("-".join(short.get(axis, axis) for axis in axes))

    for world in (1, 6, 8, 16, 24, 36, 64):
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        for pp in divisors:
            for a in divisors:
                for b in divisors:
                    if world % (pp * a * b):
                        continue
                    plan = GroupPlan.build(
                        world,
                        b,
                        scope="global",
                        tensor_parallel=a,
                        context_parallel=b,
                        pipeline_parallel=pp,
                        expert_tensor_parallel=a,
                    )
                    rest = world // (pp * a * b)
                    for kind, axes in DENSE_KINDS.items():
                        wanted = theirs(axes, tp=a, cp=b, ep=1, dp=rest, pp=pp)
                        assert list(map(list, plan.groups(kind))) == wanted
                    for kind, axes in EXPERT_KINDS.items():
                        wanted = theirs(axes, tp=a, cp=1, ep=b, dp=rest, pp=pp)
                        assert list(map(list, plan.groups(kind))) == wanted
