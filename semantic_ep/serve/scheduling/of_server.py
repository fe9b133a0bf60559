"""The scheduler that a server's settings ask for."""

from __future__ import annotations

from semantic_ep.config import SemanticEPConfig
from semantic_ep.errors import ConfigError, explain
from semantic_ep.serve.engine import SemanticInferenceEngine
from semantic_ep.serve.plans import ServingPlans
from semantic_ep.serve.scheduling.make import make_scheduler
from semantic_ep.serve.scheduling.measured import measured_accelerator, serving_cost
from semantic_ep.serve.scheduling.queue import Scheduler
from semantic_ep.topology import Topology


def server_scheduler(
    engine: SemanticInferenceEngine,
    *,
    settings: SemanticEPConfig,
    plans: ServingPlans,
    topology: Topology,
) -> Scheduler:
    """Make it; for rank 0, whose device is measured if the policy predicts times.

    What it takes for cached on a rank is what it sent there last, as much as the rank's KV cache
    holds: an approximation, since running sequences need room too. A rank that has less computes
    more, and nothing else.

    Args:
        engine: With the model loaded.
        settings: Of the run.
        plans: That the experts are placed by.
        topology: Nodes and links of the ranks.

    Raises:
        ConfigError: The policy needs what is not there.
    """
    max_sequences = settings.serve.max_sequences
    name = policy_of(settings, has_plan=plans.plan is not None)
    if settings.serve.attention == "tp":
        return make_scheduler(name, ep_size=1, max_sequences=max_sequences)
    cost = None
    if name == "semantic":
        parameter = next(engine.model.module.parameters())
        cost = serving_cost(
            engine,
            accelerator=measured_accelerator(parameter.device, parameter.dtype),
            topology=topology,
        )
    return make_scheduler(
        name,
        ep_size=engine.group.size(),
        schedule=plans.schedule,
        decode_schedule=plans.decode_schedule,
        top_k=engine.model.fingerprint.top_k,
        cost=cost,
        prefix_tokens_per_rank=settings.serve.kv_cache_tokens if settings.serve.prefix_cache else 0,
        max_sequences=max_sequences,
    )


def policy_of(settings: SemanticEPConfig, *, has_plan: bool) -> str:
    """Name of the policy to use.

    Raises:
        ConfigError: The one asked for looks at a plan's tables, and there are none to look at.
    """
    lacking = None
    if settings.serve.attention == "tp":
        lacking = "in attention-TP all ranks serve every request"
    elif settings.schedule.mode == "off":
        lacking = "schedule.mode is off"
    elif not has_plan:
        lacking = "there is no plan"
    asked = settings.serve.policy
    if asked == "auto":
        return "semantic" if lacking is None else "least-loaded"
    if asked.startswith("semantic") and lacking is not None:
        raise ConfigError(
            explain(
                f"this policy follows a plan's tables, and {lacking}",
                where="semantic_ep.serve.policy, --semantic-ep-serve-policy",
                got=asked,
                allowed=["auto", "least-loaded", "round-robin"],
            )
        )
    return asked
