"""What the DeepSpeed integration relies on, held against the installed release."""

import inspect

import pytest

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

pytestmark = pytest.mark.upstream


def parameters(target):
    return set(inspect.signature(target).parameters)


def test_the_engine_has_the_methods_that_ours_extends():
    from deepspeed.runtime.engine import DeepSpeedEngine as Engine

    assert {"save_dir", "tag", "client_state", "save_latest"} <= parameters(Engine.save_checkpoint)
    assert {
        "load_dir",
        "tag",
        "load_optimizer_states",
        "load_module_only",
    } <= parameters(Engine.load_checkpoint)
    assert {"checkpoint"} <= parameters(Engine.load_module_state_dict)
    assert {"full_state_dict"} <= parameters(Engine._get_non_moe_state_dict)
    names = ["self", "checkpoints_path", "tag", "mp_placeholder", "pp_placeholder"]
    assert list(inspect.signature(Engine._get_ckpt_name).parameters) == names
    # What ZeRO 3 has in pieces is read here and nowhere else.
    assert "self._load_zero_checkpoint(" in inspect.getsource(Engine.load_checkpoint)
    for question in (
        "bfloat16_enabled",
        "load_universal_checkpoint",
        "zero_optimization",
        "zero_optimization_partition_weights",
        "zero_optimization_stage",
    ):
        assert parameters(getattr(Engine, question)) == {"self"}


def test_a_step_clips_and_steps_where_copies_of_experts_are_summed_before_and_follow_after():
    from deepspeed.runtime.engine import DeepSpeedEngine as Engine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Zero
    from deepspeed.utils.tensor_fragment import get_full_hp_grad

    step = inspect.getsource(Engine._take_model_step)
    assert step.index("self.clip_fp32_gradients()") < step.index("self.optimizer.step()")
    assert "self._take_model_step(" in inspect.getsource(Engine.step)
    # ZeRO takes norms and steps from these lists, of which ours change the values in place.
    assert "self.averaged_gradients[i]" in inspect.getsource(Zero.scaled_global_norm)
    assert "self.averaged_gradients[i]" in inspect.getsource(Zero.step)
    assert "self._hp_mapping.get_lp_grad_fragment(self._index_in_param_group)" in (
        inspect.getsource(get_full_hp_grad)
    )


def test_groups_of_experts_are_registered_by_name():
    from deepspeed.utils import groups

    for registered in (
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        assert isinstance(registered, dict)


def test_zero_3_finds_experts_by_the_marks_that_ours_carry():
    from deepspeed.runtime.engine import DeepSpeedEngine as Engine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

    placing = inspect.getsource(Engine._resolve_zero3_param_placement)
    for mark in ("ds_zero_placement_family", "autoep_expert", "ds_zero_partition_group_name"):
        assert mark in placing
        assert mark in inspect.getsource(Zero._autoep_expert_parallel_group)
    # It takes no other MoE layers, so that the marker of ours is one of AutoEP's.
    assert "AutoEPMoELayer" in inspect.getsource(Engine._validate_zero3_moe_compatibility)


def test_zero_3_keeps_pieces_in_the_order_that_ours_reads():
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

    partition = inspect.getsource(Zero.set_grad_positions)
    assert "self.grad_position[param_id] = [int(i), int(current_offset), int(num_elements)]" in (
        partition
    )
    assert "param.partition_numel()" in partition
    stored = inspect.getsource(Zero._rigid_state_dict)
    for name in ("FP32_FLAT_GROUPS", "OPTIMIZER_STATE_DICT", "ds_zero_partition_groups"):
        assert name in stored
    for method in (
        "checkpoint_event_prologue",
        "checkpoint_event_epilogue",
        "_reassign_or_swap_out_partitioned_parameters",
    ):
        assert callable(getattr(Zero, method))
    universal = inspect.getsource(Zero.load_hp_checkpoint_state_from_checkpoint_dir_stage3)
    assert "self.load_hp_checkpoint_state(" in universal
    assert "param=param" in universal


def test_a_universal_checkpoint_is_made_and_loaded_in_the_way_that_ours_joins():
    from deepspeed.checkpoint import constants, ds_to_universal, universal_checkpoint
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    arguments = inspect.getsource(ds_to_universal.parse_arguments)
    for name in (
        "input_folder",
        "output_folder",
        "num_extract_workers",
        "num_merge_workers",
        "keep_temp_folder",
        "strict",
        "inject_missing_state",
    ):
        assert name in arguments
    assert constants.FP32_WEIGHT_KEY == "fp32"
    load = universal_checkpoint.load_hp_checkpoint_state
    assert {"self", "folder", "ep_rank", "ep_size"} <= parameters(load)
    loading = inspect.getsource(ZeROOptimizer.load_hp_checkpoint_state_from_checkpoint_dir)
    assert "lp.load_hp_checkpoint_state(" in loading
    # What a loader leaves behind.
    for attribute in ("lp_fragment_address", "optim_fragment", "get_hp_fragment()"):
        assert f"hp_mapping.{attribute}" in inspect.getsource(load)


def test_native_layers_answer_as_the_exchange_reads_them():
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.sharded_moe import MOELayer, TopKGate

    # Our exchange passes them by position.
    names = ["self", "input", "used_token", "sparse_routes", "use_tutel"]
    assert list(inspect.signature(TopKGate.forward).parameters) == names
    assert "gate" in parameters(MOELayer.__init__)
    assert {"num_experts", "ep_size", "use_tutel", "drop_tokens"} <= parameters(MoE.__init__)
