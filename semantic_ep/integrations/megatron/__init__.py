"""Megatron-core: place the experts of a model, and profile its routing.

In a script that builds a Megatron model:

    parse_args(extra_args_provider=add_arguments)
    run = SemanticRun.prepare(SemanticEPConfig.resolve(args=args), config, vocab_size=...)
    run.seed(seed)                        # in the place of model_parallel_cuda_manual_seed
    model = GPTModel(config, run.place(layer_spec), pg_collection=run.pg_collection, ...)
    config.finalize_model_grads_func = run.finalize_model_grads
    optimizer = run.optimizer(optimizer_config, [wrapped model])
    observation = run.observe(model)      # then step() after the optimizer, save() at checkpoints
    replanning = run.replan(model, optimizer, observation)    # then step(number) after both
"""

from semantic_ep.config import add_arguments
from semantic_ep.integrations.megatron.checkpoint import check_optimizer_fits
from semantic_ep.integrations.megatron.groups import SemanticExpertGroup
from semantic_ep.integrations.megatron.layer import PlacedLayers, SemanticMoELayer
from semantic_ep.integrations.megatron.observation import ModelObservation
from semantic_ep.integrations.megatron.run import SemanticRun
from semantic_ep.integrations.megatron.specs import place_experts

__all__ = [
    "ModelObservation",
    "PlacedLayers",
    "SemanticExpertGroup",
    "SemanticMoELayer",
    "SemanticRun",
    "add_arguments",
    "check_optimizer_fits",
    "place_experts",
]
