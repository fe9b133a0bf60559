"""`initialize`: `deepspeed.initialize` that reads the `semantic_ep` section of the same JSON."""

from __future__ import annotations

import json
import logging
import os
from argparse import Namespace
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.config import SECTION, SemanticEPConfig, section_of
from semantic_ep.errors import CheckpointError, ConfigError, PeerFailureError, explain
from semantic_ep.integrations.deepspeed.copies import EngineCopies
from semantic_ep.integrations.deepspeed.engine import SemanticEngine
from semantic_ep.integrations.deepspeed.native import native_layers, place_native_experts
from semantic_ep.integrations.deepspeed.observation import EngineObservation, find_routers
from semantic_ep.integrations.deepspeed.placing import PlacedExperts, place_experts
from semantic_ep.integrations.deepspeed.replanning import EnginePlacement
from semantic_ep.integrations.deepspeed.universal import NATIVE
from semantic_ep.integrations.replanning import Replanning, check_settings
from semantic_ep.plan.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

logger = logging.getLogger(__name__)

# What gloo, NCCL and the store say when a peer is gone; they raise plain RuntimeErrors.
_PEER_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "timed out waiting",
    "broken pipe",
    "socket timeout",
    "nccl communicator was aborted",
    "remote process exited",
)


def initialize(
    args: Namespace | None = None,
    model: nn.Module | None = None,
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    tokenizer_json: bytes | None = None,
    **deepspeed_arguments: Any,
) -> tuple[Any, Any, Any, Any]:
    """Call `deepspeed.initialize`, and do what the `semantic_ep` section says.

    With `enabled` and `observe.output` set, the routing of training tokens is recorded; the
    profile is written by `engine.save_checkpoint` and read back by `engine.load_checkpoint`.
    `engine.semantic_ep` is the `EngineObservation`, or None.

    With `enabled` and `plan.artifact` set, the experts of a Hugging Face model are spread over the
    ranks by the plan, and checkpoints can be resumed under any other plan or number of ranks.
    Native `deepspeed.moe` layers follow a plan too, and resume under the same one only.
    `engine.placed_experts` is the `PlacedExperts`, or None.

    With both, drift is reported at checkpoints; with `replan.interval` too, experts move to a new
    plan when that pays. `engine.replanning` is the `Replanning`, or None.

    Args:
        args: As in DeepSpeed; `--semantic-ep-...` flags in it override the JSON.
        model: As in DeepSpeed.
        config: DeepSpeed JSON, as a path or a mapping; else `args.deepspeed_config`.
        tokenizer_json: Contents of tokenizer.json, to tell models apart by tokenizer too.
        **deepspeed_arguments: Passed on.

    Returns:
        (engine, optimizer, dataloader, lr_scheduler), as DeepSpeed.

    Raises:
        ConfigError: The section is wrong, or asks for what this engine cannot do.
        ArtifactError: The plan cannot be read, or belongs to another model.
        PlacementError: The plan cannot be trained under.
    """
    import deepspeed

    deepspeed_config = read_config(config, args)
    settings = SemanticEPConfig.resolve(json_section=section_of(deepspeed_config), args=args)
    if settings.enabled:
        check_possible(settings, deepspeed_config)
    observe = settings.enabled and settings.observe.output != "auto"
    placed = settings.enabled and settings.plan.artifact != "auto"
    # AutoEP replaces modules and the identity of the model is read from them: before, not after.
    identity = _hugging_face_identity(model, tokenizer_json) if observe or placed else None
    placed_experts = None
    if placed:
        if deepspeed_arguments.get("mpu") is not None:
            raise ConfigError(
                explain(
                    "a plan places experts over data-parallel ranks only, and an mpu was given",
                    where="semantic_ep.plan.artifact, --semantic-ep-plan-artifact",
                    do="Remove tensor and pipeline parallelism, or the plan",
                )
            )
        placed_experts = _place(model, settings, identity, zero_stage(deepspeed_config))
        if placed_experts.native and deepspeed_config.get("checkpoint", {}).get("load_universal"):
            raise ConfigError(
                explain(
                    NATIVE,
                    where="checkpoint.load_universal",
                    do="Remove it, and resume a checkpoint under its own plan",
                )
            )
    plain = {key: value for key, value in deepspeed_config.items() if key != SECTION}
    biases = _correction_biases(model) if observe else []
    engine, *others = deepspeed.initialize(
        args=_without_config(args), model=model, config=plain, **deepspeed_arguments
    )
    engine.semantic_ep = engine.replanning = None
    engine.placed_experts = placed_experts
    if observe:
        _check_kept(biases, engine.module)
        engine.semantic_ep = EngineObservation(
            engine,
            settings.observe,
            fingerprint=identity or _identity_of_layers(engine.module),
            vocab_size=_vocab_size(engine.module),
        )
    if observe and placed:
        movable = None if settings.replan.interval == "auto" else EnginePlacement(engine)
        engine.replanning = Replanning(settings, engine.semantic_ep, movable)
    if placed_experts is not None and placed_experts.placement.has_replicas:
        EngineCopies(engine)  # Refuses what copies do not go with before a step is made.
    if observe or placed:
        # DeepSpeed has no callback for these events, and chooses the class of its engine itself.
        engine.__class__ = type(type(engine).__name__, (SemanticEngine, type(engine)), {})
    return (engine, *others)


def read_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | None, args: Namespace | None
) -> dict[str, Any]:
    """The DeepSpeed configuration as a dictionary.

    Raises:
        ConfigError: There is none, or its file is no JSON object.
    """
    source = config if config is not None else getattr(args, "deepspeed_config", None)
    if isinstance(source, Mapping):
        return dict(source)
    if source is None:
        raise ConfigError(
            explain("no DeepSpeed configuration was given", do="Pass --deepspeed_config FILE")
        )
    try:
        loaded = json.loads(Path(source).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            explain(f"cannot read the DeepSpeed configuration: {error}", where=str(source))
        ) from error
    if not isinstance(loaded, dict):
        raise ConfigError(
            explain("the DeepSpeed configuration must be a JSON object", where=str(source))
        )
    return loaded


@contextmanager
def peers_must_answer() -> Iterator[None]:
    """Turn what a backend says about a lost peer into a `PeerFailureError` that says what to do."""
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        text = str(error)
        lost = isinstance(error, dist.DistError) or any(sign in text.lower() for sign in _PEER_LOST)
        if not lost or isinstance(error, PeerFailureError):
            raise
        raise PeerFailureError(
            explain(
                f"rank {dist.get_rank()} stops: another rank died or does not answer",
                got=text.splitlines()[0][:200],
                do="See the log of the rank that failed first; the last complete checkpoint and "
                "profile are intact",
            )
        ) from error


def check_possible(settings: SemanticEPConfig, deepspeed_config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if the section contradicts the rest of a DeepSpeed configuration."""
    check_settings(settings)
    _check_placed(settings, deepspeed_config)
    autoep = deepspeed_config.get("expert_parallel", {})
    autoep_size = autoep.get("autoep_size") if autoep.get("enabled") else None
    if settings.groups.ep_size not in ("auto", autoep_size or settings.groups.ep_size):
        raise ConfigError(
            explain(
                "two settings say how many ranks share the experts, and differ",
                where="semantic_ep.groups.ep_size, --semantic-ep-groups-ep-size",
                got=f"{settings.groups.ep_size}, and expert_parallel.autoep_size = {autoep_size}",
                do="Remove groups.ep_size, or set both alike",
            )
        )


def zero_stage(deepspeed_config: Mapping[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed configuration."""
    return int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))


def _check_placed(settings: SemanticEPConfig, deepspeed_config: Mapping[str, Any]) -> None:
    if settings.plan.artifact == "auto":
        return
    where = "semantic_ep.plan.artifact, --semantic-ep-plan-artifact"
    if deepspeed_config.get("expert_parallel", {}).get("enabled"):
        raise ConfigError(
            explain(
                "AutoEP and the plan would both spread the experts",
                where=where,
                got="expert_parallel.enabled = true",
                do="Remove expert_parallel: a plan needs no AutoEP; or remove the plan, for "
                "contiguous placement",
            )
        )
    stage = zero_stage(deepspeed_config)
    if deepspeed_config.get("checkpoint", {}).get("load_universal") and stage == 0:
        raise ConfigError(
            explain(
                "universal checkpoints load into the optimizer of ZeRO 1, 2 or 3",
                where="checkpoint.load_universal",
                got=f"zero_optimization.stage = {stage}",
                do="Set stage 1, 2 or 3; or remove it",
            )
        )


def _place(
    model: nn.Module | None,
    settings: SemanticEPConfig,
    identity: ModelFingerprint | None,
    stage: int,
) -> PlacedExperts:
    """Read the plan and spread the experts; collective."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    plan = Plan.read(settings.plan.artifact)
    where = "semantic_ep.groups.ep_size, --semantic-ep-groups-ep-size"
    native = model is not None and bool(native_layers(model))
    if identity is None and native:
        identity = _identity_of_layers(model)
    if identity is None:
        raise ConfigError(
            explain(
                "a plan places the experts of Hugging Face models and of deepspeed.moe layers",
                where="semantic_ep.plan.artifact, --semantic-ep-plan-artifact",
                got=type(model).__name__,
                do="Pass the PreTrainedModel itself; the log says why it was not recognised",
            )
        )
    identity.check(
        plan.fingerprint, what=f"the plan {settings.plan.artifact}", allow_retrained=True
    )
    if settings.groups.ep_size not in ("auto", plan.placement.ep_size):
        raise ConfigError(
            explain(
                "the plan is for another number of ranks",
                where=where,
                got=f"{settings.groups.ep_size}, and the plan {plan.placement.ep_size}",
                do="Remove groups.ep_size, or plan with --ep-size",
            )
        )
    deepspeed.init_distributed(verbose=False)
    place = place_native_experts if native else place_experts
    return place(
        model,
        plan.placement,
        settings,
        device=torch.device(get_accelerator().current_device_name()),
        zero_stage=stage,
    )


def _without_config(args: Namespace | None) -> Namespace | None:
    """DeepSpeed takes its configuration from one place only."""
    if args is None:
        return None
    return Namespace(**{k: v for k, v in vars(args).items() if k != "deepspeed_config"})


def _hugging_face_identity(
    model: nn.Module | None, tokenizer_json: bytes | None
) -> ModelFingerprint | None:
    from semantic_ep.integrations.transformers import model_fingerprint

    try:
        return model_fingerprint(model, tokenizer_json)
    except CheckpointError as error:
        logger.info("the model is identified by its layers alone: %s", error)
        return None


def _identity_of_layers(model: nn.Module) -> ModelFingerprint:
    routers = find_routers(model)
    return ModelFingerprint(
        architecture=type(model).__name__,
        layer_ids=tuple(range(len(routers))),
        num_experts=routers[0].num_experts,
        top_k=routers[0].top_k,
    )


def _correction_biases(model: nn.Module | None) -> list[str]:
    """Names of what routers add to their scores to choose experts."""
    if model is None:
        return []
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, _ in tensors if name.endswith(".e_score_correction_bias")]


def _check_kept(biases: list[str], model: nn.Module) -> None:
    """Raise if AutoEP left out a router's bias, as it does with a buffer up to 0.19.6."""
    import deepspeed
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    for block, layer in model.named_modules():
        bias = next((name for name in biases if name.startswith(f"{block}.")), None)
        if bias is None or not isinstance(layer, AutoEPMoELayer):
            continue
        if layer.router.e_score_correction_bias is None:
            raise ConfigError(
                explain(
                    f"AutoEP of this DeepSpeed leaves out {bias}, so that tokens go to other "
                    "experts than the model's own",
                    where="expert_parallel.enabled",
                    got=f"deepspeed {deepspeed.__version__}",
                    allowed="deepspeed >=0.19.7 for this family",
                    do="Install that, or train under a plan, which leaves routers as they are",
                )
            )


def _vocab_size(model: nn.Module) -> int:
    from torch import nn

    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None:
        size = max(
            (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=None
        )
    if size is None:
        raise ConfigError(
            explain(
                "the vocabulary of the model is unknown",
                where="semantic_ep.observe.output",
                do="Give the model a config with vocab_size, or switch observation off",
            )
        )
    return int(size)
