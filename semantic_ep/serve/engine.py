"""Serving engine over an EP group, in lockstep.

Attention-DP: every rank serves its own requests with its own attention and KV cache; only the MoE
layers exchange tokens. All ranks of the group therefore step together: a rank without work takes
part in the exchanges with no tokens until the last rank is done. Attention-TP: every rank has all
requests, and its share of the heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from semantic_ep.apply.checkpoint import Checkpoint
from semantic_ep.errors import RequestError, explain
from semantic_ep.integrations.deepspeed.inference import ExpertParallelModel, init_inference
from semantic_ep.integrations.sharded_loading import expert_bytes
from semantic_ep.plan.placement import Placement
from semantic_ep.runtime.collectives import from_all_ranks, peer_guard
from semantic_ep.serve.blocks import BLOCK_SIZE, blocks_for
from semantic_ep.serve.protocol import EngineRequest, SamplingParams
from semantic_ep.serve.requests import check_request
from semantic_ep.serve.worker import RankWorker

_STEP_TOKENS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """What one rank did in one call of `generate`.

    Attributes:
        outputs: New tokens of each of the prompts that this rank brought.
        seconds: Of "dispatch", "experts" and "combine", summed over layers and steps. They include
            waiting for the other ranks.
        steps: In which the model ran, equal on all ranks.
    """

    outputs: list[list[int]]
    seconds: dict[str, float]
    steps: int


class SemanticInferenceEngine:
    """A model on `deepspeed.init_inference` with experts sharded by a placement."""

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
    def max_model_tokens(self) -> int | None:
        """Longest sequence that the model's positions allow, if it says."""
        return getattr(self.model.module.config.get_text_config(), "max_position_embeddings", None)

    def worker(self, *, kv_cache_tokens: int, **options: Any) -> RankWorker:
        """Start serving on this rank; see `RankWorker` for the options."""
        return RankWorker(
            self.model, rank=self.group.rank(), kv_cache_tokens=kv_cache_tokens, **options
        )

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
            prompts: Token ids of this rank's requests. In attention-TP all ranks serve those of
                rank 0, and the others pass none.
            max_new_tokens: Bound on the new tokens of each.
            max_batch_size: Sequences that run together on this rank.
            on_tokens: Called after each step with the number of tokens generated here.

        Raises:
            RequestError: A prompt is empty or too long for the model; or another rank than 0
                brings prompts in attention-TP.
            PeerFailureError: Another rank died or did not answer in time.
        """
        self.model.context.timer.reset()
        mine = prompts
        if self.model.token_slices is not None:
            prompts = self._of_rank_0(prompts)
        sampling = SamplingParams(max_tokens=max_new_tokens, temperature=0)
        requests = [
            EngineRequest(id=str(index), prompt_token_ids=prompt, sampling=sampling)
            for index, prompt in enumerate(prompts)
        ]
        limit = self.max_model_tokens or math.inf
        for request in requests:
            check_request(request, max_sequence_tokens=limit)
        worker = self.worker(
            kv_cache_tokens=_cache_for(requests, max_batch_size),
            # Each then finds its share of the cache in one piece.
            max_sequences=max(min(max_batch_size, len(requests)), 1),
            # Nobody waits for the first token of another: long prefills are the fewest steps.
            max_step_tokens=self.model.dispatcher.max_tokens or _STEP_TOKENS,
        )
        for request in requests:
            worker.add(request)
        outputs: list[list[int]] = [[] for _ in mine]
        steps = 0
        while self._anybody_works(bool(worker.batcher)):
            events = worker.step()
            steps += 1
            for event in events:
                outputs[int(event.request_id)] += event.token_ids
            if on_tokens is not None and events:
                on_tokens(len(events))
        return Generation(outputs=outputs, seconds=self.model.context.timer.seconds(), steps=steps)

    def _of_rank_0(self, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        everyone = from_all_ranks(prompts, "gathering of prompts", self.group)
        if any(everyone[1:]):
            raise RequestError(
                explain(
                    "in attention-TP rank 0 takes the requests of all",
                    where="prompts",
                    got=f"{[len(part) for part in everyone]} prompts by rank",
                    do="Pass them on rank 0, and none on the others",
                )
            )
        return everyone[0]

    def _anybody_works(self, working: bool) -> bool:
        if self.group.size() == 1:
            return working
        flag = torch.tensor(int(working), device=self.model.context.timer.device)
        with peer_guard("all-reduce of the lockstep", self.group):
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)


def _cache_for(requests: Sequence[EngineRequest], together: int) -> int:
    """Positions that the longest `together` requests may need, in whole blocks."""
    needed = sorted(
        (len(request.prompt_token_ids) + request.sampling.max_tokens for request in requests),
        reverse=True,
    )
    return BLOCK_SIZE * sum(blocks_for(tokens) for tokens in needed[:together])
