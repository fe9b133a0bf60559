"""Serving engine: attention-DP over an EP group, in lockstep.

Every rank serves its own requests with its own attention and KV cache; only the MoE layers
exchange tokens. All ranks of the group therefore step together: a rank without work takes part in
the exchanges with no tokens until the last rank is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from semantic_ep.apply.checkpoint import Checkpoint
from semantic_ep.errors import ConfigError, explain
from semantic_ep.integrations.deepspeed.inference import ExpertParallelModel, init_inference
from semantic_ep.integrations.sharded_loading import expert_bytes
from semantic_ep.plan.placement import Placement
from semantic_ep.runtime.collectives import peer_guard
from semantic_ep.serve.generation import GreedyBatch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """What one rank did in one call of `generate`.

    Attributes:
        outputs: New tokens of each of this rank's prompts.
        seconds: Of "dispatch", "experts" and "combine", summed over layers and steps. They include
            waiting for the other ranks.
    """

    outputs: list[list[int]]
    seconds: dict[str, float]


class SemanticInferenceEngine:
    """Greedy generation on `deepspeed.init_inference` with experts sharded by a placement."""

    def __init__(self, model: ExpertParallelModel, group: ProcessGroup) -> None:
        self.model = model
        self.group = group

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint | Path,
        *,
        placement: Placement,
        group: ProcessGroup,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> SemanticInferenceEngine:
        """Load a Hugging Face checkpoint; every rank of the group calls this together.

        Args:
            checkpoint: Directory, or opened, in logical expert order.
            placement: Experts of every MoE layer on the slots of the group's ranks.
            group: The EP group.
            device: Of this rank.
            **options: See `semantic_ep.integrations.deepspeed.inference.init_inference`.
        """
        if isinstance(checkpoint, Path):
            checkpoint = Checkpoint.open(checkpoint)
        model = init_inference(
            checkpoint, placement=placement, group=group, device=torch.device(device), **options
        )
        return cls(model, group)

    @property
    def expert_bytes_resident(self) -> int:
        """Bytes of routed experts on this rank."""
        return expert_bytes(self.model.module)

    @property
    def expert_bytes_total(self) -> int:
        """Bytes of one copy of every routed expert, over all ranks."""
        placement = self.model.placement
        return self.expert_bytes_resident // placement.slots_per_rank * placement.num_experts

    @property
    def stop_ids(self) -> frozenset[int]:
        """End-of-sequence ids of the checkpoint's generation config."""
        stop = self.model.module.generation_config.eos_token_id
        if stop is None:
            return frozenset()
        return frozenset(stop if isinstance(stop, list) else [stop])

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        max_batch_size: int = 32,
        on_tokens: Callable[[int], object] | None = None,
    ) -> Generation:
        """Generate greedily for this rank's prompts while the other ranks do theirs.

        Every rank of the group calls this together, with any number of prompts, also none.
        Counters of the dispatcher go on from where they are.

        Args:
            prompts: Token ids of this rank's requests.
            max_new_tokens: Bound on the new tokens of each.
            max_batch_size: Sequences that run together on this rank.
            on_tokens: Called after each step with the number of tokens generated here.

        Raises:
            ConfigError: A prompt is empty or too long for the model.
            PeerFailureError: Another rank died or did not answer in time.
        """
        self._check_prompts(prompts, max_new_tokens)
        self.model.context.timer.reset()
        outputs: list[list[int]] = [[] for _ in prompts]
        # Equal lengths together: less padding goes through attention.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        waiting = [order[i : i + max_batch_size] for i in range(0, len(order), max_batch_size)]
        batch: GreedyBatch | None = None
        members: list[int] = []
        while self._anybody_works(batch is not None or bool(waiting)):
            if batch is None and waiting:
                members = waiting.pop()
                batch = GreedyBatch(
                    self.model,
                    [prompts[index] for index in members],
                    max_new_tokens=max_new_tokens,
                    stop_ids=self.stop_ids,
                )
            if batch is None:
                for experts in self.model.experts:
                    experts.run_idle()
                continue
            generated = batch.step()
            if on_tokens is not None:
                on_tokens(generated)
            if batch.finished:
                for index, output in zip(members, batch.outputs):
                    outputs[index] = output
                batch = None
        return Generation(outputs=outputs, seconds=self.model.context.timer.seconds())

    def _anybody_works(self, working: bool) -> bool:
        flag = torch.tensor(int(working), device=self.model.context.timer.device)
        with peer_guard("all-reduce of the lockstep", self.group):
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)

    def _check_prompts(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        config = self.model.module.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None) or np.inf
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= longest - max_new_tokens:
                raise ConfigError(
                    explain(
                        f"prompt {index} cannot be served",
                        got=f"{len(prompt)} tokens and {max_new_tokens} to generate",
                        allowed=f"at least 1 token, and {longest} in all",
                        do="Cut the prompt, or lower --max-new-tokens",
                    )
                )
