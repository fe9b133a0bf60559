"""Greedy generation for a left-padded batch, one step at a time.

A step is one pass through the model: the prefill of all prompts of the batch, then one token for
each sequence. Padding and finished sequences stay in the tensors, but the mask given to the MoE
layers keeps their tokens from being sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from semantic_ep.integrations.deepspeed.inference import ExpertParallelModel


class GreedyBatch:
    """Sequences that are prefilled and decoded together.

    Args:
        model: Where to run.
        prompts: Token ids of each sequence, at least one a sequence.
        max_new_tokens: Tokens to generate at most.
        stop_ids: Ids that end a sequence; the id itself is part of the output.

    Attributes:
        outputs: New tokens of each sequence so far.
    """

    def __init__(
        self,
        model: ExpertParallelModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: frozenset[int],
    ) -> None:
        from transformers import DynamicCache

        self.outputs: list[list[int]] = [[] for _ in prompts]
        self._model = model
        self._max_new_tokens = max_new_tokens
        self._stop_ids = stop_ids
        self._cache: Any = DynamicCache(config=model.module.config)
        longest = max(map(len, prompts))
        device = model.context.timer.device
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        self._next_ids = ids.to(device)
        self._attention_mask = mask.to(device)
        self._running = torch.ones(len(prompts), dtype=torch.bool, device=device)

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return not bool(self._running.any())

    def step(self) -> int:
        """Run the model once and append a token to each running sequence; returns how many."""
        width = self._next_ids.shape[1]
        position_ids = (self._attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -width:]
        real = self._attention_mask[:, -width:].bool() & self._running[:, None]
        self._model.context.mask_T = real.flatten()
        logits = self._model.engine(
            input_ids=self._next_ids,
            attention_mask=self._attention_mask,
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return self._append(logits.argmax(dim=-1))

    def _append(self, token_B: Tensor) -> int:
        running = self._running.tolist()
        for row, token in enumerate(token_B.tolist()):
            if not running[row]:
                continue
            self.outputs[row].append(token)
            if token in self._stop_ids or len(self.outputs[row]) >= self._max_new_tokens:
                self._running[row] = False
        self._next_ids = token_B[:, None]
        one = self._attention_mask.new_ones(len(token_B), 1)
        self._attention_mask = torch.cat([self._attention_mask, one], dim=1)
        return sum(running)
