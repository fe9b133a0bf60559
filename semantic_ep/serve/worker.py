"""One rank's share of a lockstep step: batch, run the model once, choose tokens.

In attention-TP every rank has all requests and the same batch, and rank 0 speaks for all.
"""

from __future__ import annotations

from typing import Any

import torch

from semantic_ep.errors import ConfigError, explain
from semantic_ep.integrations.deepspeed.inference import ExpertParallelModel
from semantic_ep.integrations.paged_attention import Chunk, PackedBatch, PagedKVCache
from semantic_ep.observe.recorder import RoutingRecorder
from semantic_ep.serve.batcher import Batcher
from semantic_ep.serve.blocks import BLOCK_SIZE, BlockPool, blocks_for
from semantic_ep.serve.protocol import EngineRequest, RecordedPhase, TokenEvent
from semantic_ep.serve.sampler import logprobs, sample
from semantic_ep.serve.sequences import Sequence
from semantic_ep.serve.stats import RankLoad

MAX_STEP_TOKENS = 512


class RankWorker:
    """Serves the requests of one rank; every rank of the group steps together.

    Args:
        model: Where to run.
        rank: EP rank, for the events.
        kv_cache_tokens: Positions of the KV cache, rounded down to whole blocks.
        block_size: Positions of a block.
        max_sequences: Sequences that run together.
        max_step_tokens: Tokens of a step: decoding sequences, and chunks of prompts up to here.
        tokenizer: Of transformers, for text and stop texts; None: tokens only.
        prefix_cache: Whether keys and values of a beginning that requests share are computed once.

    Attributes:
        has_all_requests: Whether a request belongs to every rank (attention-TP), not to one.
        speaks: Whether this rank reports events and counts requests.
        prompt_tokens, new_tokens: Counted since the start.
        recorder: Has what was last recorded, or is being (see `semantic_ep.serve.recording`).
        recorded_phase: Tokens that it counts.
        slot_rows_before: Rows that each slot had computed when the placement in use was taken over.

    Raises:
        ConfigError: The model's exchange was made for smaller steps.
    """

    def __init__(
        self,
        model: ExpertParallelModel,
        *,
        rank: int,
        kv_cache_tokens: int,
        block_size: int = BLOCK_SIZE,
        max_sequences: int = 32,
        max_step_tokens: int = MAX_STEP_TOKENS,
        tokenizer: Any = None,
        prefix_cache: bool = False,
    ) -> None:
        step_tokens = max(max_step_tokens, max_sequences)
        _check_step(step_tokens, model.dispatcher.max_tokens)
        self.model = model
        self.prompt_tokens = self.new_tokens = 0
        self.recorder: RoutingRecorder | None = None
        self.recorded_phase: RecordedPhase = "all"
        self.slot_rows_before: Any = 0
        self._rank = rank
        self.has_all_requests = model.token_slices is not None
        self.speaks = rank == 0 or not self.has_all_requests
        self._tokenizer = tokenizer
        # Latent keys (DeepSeek) are expanded by the model after the cache has gathered them; on a
        # GPU one launch for all sequences is worth a copy.
        config = model.module.config.get_text_config()
        latent = getattr(config, "kv_lora_rank", None) is not None
        self._in_place = model.context.timer.device.type == "cpu" and not latent
        pool = BlockPool(num_blocks=kv_cache_tokens // block_size, block_size=block_size)
        self.batcher = Batcher(
            pool,
            max_sequences=max_sequences,
            max_step_tokens=step_tokens,
            prefix_cache=prefix_cache,
        )
        self.cache = PagedKVCache(num_blocks=pool.num_blocks, block_size=block_size)

    def add(self, request: EngineRequest) -> None:
        """Queue a request that fits (see `SemanticInferenceEngine.check`)."""
        self.batcher.add(Sequence(request, stop_ids=self.model.stop_ids, tokenizer=self._tokenizer))
        self.prompt_tokens += len(request.prompt_token_ids) * self.speaks

    def load(self) -> RankLoad:
        """What this rank has to do; requests that all ranks have count on rank 0 only."""
        return self.batcher.load() if self.speaks else RankLoad()

    def cancel(self, request_id: str) -> TokenEvent | None:
        """End a request and free its blocks; None if it is not here."""
        if self.batcher.remove(request_id) is None or not self.speaks:
            return None
        return TokenEvent(request_id=request_id, finish_reason="cancelled", rank=self._rank)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Run the model once, or take part in the exchanges without tokens. Communicates.

        Raises:
            PeerFailureError: Another rank died or did not answer in time.
        """
        work = self.batcher.plan()
        if not work:
            # Where all ranks have one batch, none has work, and there is nobody to wait for.
            if not self.has_all_requests:
                for experts in self.model.experts:
                    experts.run_idle()
            return []
        device = self.model.context.timer.device
        batch = PackedBatch.build(
            [self._chunk(sequence, count) for sequence, count in work],
            block_size=self.cache.block_size,
            device=device,
            in_place=self._in_place,
        )
        self.cache.batch = batch
        ids = [
            token
            for sequence, count in (work[c] for c in batch.order)
            for token in sequence.tokens[sequence.computed : sequence.computed + count]
        ]
        ready = [row for row, (sequence, count) in enumerate(work) if count == sequence.pending]
        id_T = torch.tensor(ids, device=device)
        recording = self.model.context.recorder is not None
        generated_T = None
        if self.model.phases is not None or (recording and self.recorded_phase != "all"):
            generated_T = _generated([work[c] for c in batch.order]).to(device)
        self.model.context.generated_T = generated_T
        if recording:
            sequence_T = [c for c in batch.order for _ in range(work[c][1])]
            mask_T = self._recorded_tokens(generated_T)
            self.recorder.start_micro_batch(
                id_T, mask_T=mask_T, sequence_T=torch.tensor(sequence_T)
            )
        if self.model.token_slices is not None:
            self.model.token_slices.start_step(id_T, generated_T)
        logits_BV = self.model.engine(
            input_ids=id_T[None],
            position_ids=batch.position_T[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=batch.last_C[ready],
            packed_batch=batch,
        ).logits[0]
        if recording:
            self.recorder.step()
        for sequence, count in work:
            self.batcher.advance(sequence, count)
        return self._append(logits_BV, [work[row][0] for row in ready])

    def _recorded_tokens(self, generated_T: torch.Tensor | None) -> torch.Tensor | None:
        """[T] true for tokens of the phase that is recorded; None for all."""
        if self.recorded_phase == "all":
            return None
        assert generated_T is not None
        return generated_T == (self.recorded_phase == "decode")

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        needed = blocks_for(sequence.computed + count, self.cache.block_size)
        return Chunk(start=sequence.computed, count=count, blocks=sequence.blocks[:needed])

    def _append(self, logits_BV: torch.Tensor, sequences: list[Sequence]) -> list[TokenEvent]:
        if not sequences:
            return []
        tokens = sample(logits_BV, sequences)
        if self.model.token_slices is not None:
            # Ranks must go on with the same tokens, also where a draw or a rounding differs.
            tokens = self.model.token_slices.agree(tokens)
        events = []
        for sequence, token, told in zip(
            sequences, tokens, logprobs(logits_BV, tokens, sequences), strict=True
        ):
            text, reason, stop = sequence.append(token)
            if reason is not None:
                self.batcher.remove(sequence.request.id)
            events.append(
                TokenEvent(
                    request_id=sequence.request.id,
                    token_ids=(token,),
                    text=text,
                    finish_reason=reason,
                    stop_reason=stop,
                    logprobs=told,
                    rank=self._rank,
                    cached_tokens=sequence.cached_tokens or 0,
                )
            )
        if not self.speaks:
            return []
        self.new_tokens += len(tokens)
        return events


def _generated(work: list[tuple[Sequence, int]]) -> torch.Tensor:
    """[T] bool, generated tokens of a step; computed again after a pre-emption they stay that."""
    return torch.tensor(
        [
            position >= len(sequence.request.prompt_token_ids)
            for sequence, count in work
            for position in range(sequence.computed, sequence.computed + count)
        ]
    )


def _check_step(step_tokens: int, max_tokens: int | None) -> None:
    """Raise `ConfigError` unless steps fit what the dispatcher was made for."""
    if max_tokens is not None and step_tokens > max_tokens:
        raise ConfigError(
            explain(
                "a step may bring more tokens than the exchange was made for",
                where="max_step_tokens, max_sequences",
                got=step_tokens,
                allowed=f"at most max_tokens = {max_tokens}",
                do="Load the model with a larger max_tokens",
            )
        )
