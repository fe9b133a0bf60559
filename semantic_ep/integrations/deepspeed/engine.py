"""What a DeepSpeed engine does besides when it observes routing or has placed experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from semantic_ep.errors import CheckpointError, explain
from semantic_ep.integrations.deepspeed.copies import EngineCopies, clip_gradients
from semantic_ep.integrations.deepspeed.placed_checkpoint import (
    load_placed,
    write_latest,
    write_placed,
)


class SemanticEngine:
    """Goes before the class of an engine with `semantic_ep`, `placed_experts` and `replanning`.

    Each of them may be None.

    Attributes:
        loads_without_pieces: While a checkpoint of ZeRO 3 is loaded whose pieces are others'.
    """

    loads_without_pieces = False
    _copies_in_force: EngineCopies | None = None

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's; with each optimizer step counts decay, and experts may move."""
        before = self.global_steps
        result = super().step(*args, **kwargs)
        if self.global_steps != before:
            if self.semantic_ep is not None:
                self.semantic_ep.step()
            if self.placed_experts is not None:
                self.placed_experts.context.timer.reset()
            if self.replanning is not None:
                self.replanning.step(self.global_steps)
        return result

    def _take_model_step(self, *args: Any, **kwargs: Any) -> Any:
        copies = self._copies()
        if copies is None:
            return super()._take_model_step(*args, **kwargs)
        copies.sum_gradients()
        result = super()._take_model_step(*args, **kwargs)
        copies.follow()
        return result

    def _copies(self) -> EngineCopies | None:
        """What keeps the copies of experts alike, if some have any in the placement in force."""
        placed = self.placed_experts
        if placed is None or not placed.placement.has_replicas:
            return None
        if self._copies_in_force is None or self._copies_in_force.placed is not placed:
            self._copies_in_force = EngineCopies(self)
        return self._copies_in_force

    def clip_fp32_gradients(self) -> None:
        """As DeepSpeed's at ZeRO 0; placed experts are added up and not averaged over ranks."""
        if self.placed_experts is not None and self.placed_experts.experts:
            clip_gradients(self)
        else:
            super().clip_fp32_gradients()

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As DeepSpeed's; `latest` names the checkpoint only when all ranks have written theirs."""
        import torch.distributed as dist

        tag = str(tag or f"global_step{self.global_steps}")
        if self.placed_experts is not None:
            write_placed(self, Path(save_dir, tag))
        # An engine that writes in the background knows alone when it is done.
        background = self.checkpoint_engine.is_decoupled()
        with self._experts_in_shards():
            result = super().save_checkpoint(
                save_dir,
                tag,
                client_state=dict(client_state or {}),
                save_latest=save_latest and background,
                **kwargs,
            )
        if self.semantic_ep is not None:
            profile = self.semantic_ep.save(Path(save_dir, tag))
            if self.replanning is not None:
                self.replanning.at_checkpoint(self.global_steps, profile)
        if save_latest and not background and dist.get_rank() == 0:
            write_latest(Path(save_dir), tag)
        dist.barrier()
        return result

    def load_checkpoint(
        self, load_dir: str, tag: str | None = None, **kwargs: Any
    ) -> tuple[str | None, Any]:
        """As DeepSpeed's; placed experts and their optimizer state go to where they are now."""
        if self.placed_experts is None:
            path, client_state = super().load_checkpoint(load_dir, tag, **kwargs)
        else:
            with self._experts_in_shards():
                path, client_state = load_placed(
                    self, super().load_checkpoint, load_dir, tag, **kwargs
                )
            if (copies := self._copies()) is not None:
                copies.follow()
        if path is not None and self.semantic_ep is not None:
            profile = self.semantic_ep.restore(path if Path(path).is_dir() else Path(path).parent)
            if self.replanning is not None:
                self.replanning.resume(profile)
        return path, client_state

    @contextmanager
    def _experts_in_shards(self) -> Iterator[None]:
        """At ZeRO 3 placed experts are stored as all parameters are, in the optimizer's shards.

        DeepSpeed would look for those of AutoEP's layers.
        """
        before = self.has_moe_layers
        if self.placed_experts is not None and self.zero_optimization_partition_weights():
            self.has_moe_layers = False
        try:
            yield
        finally:
            self.has_moe_layers = before

    def load_module_state_dict(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As DeepSpeed's, with the experts of this rank."""
        # Here DeepSpeed adds the files of its own experts; ours lie elsewhere.
        if self.placed_experts is not None:
            checkpoint["module"] |= self.placed_experts_to_load
        super().load_module_state_dict(checkpoint, *args, **kwargs)

    def _load_zero_checkpoint(self, *args: Any, **kwargs: Any) -> bool:
        return self.loads_without_pieces or super()._load_zero_checkpoint(*args, **kwargs)

    def _get_ckpt_name(
        self,
        checkpoints_path: str,
        tag: str,
        mp_placeholder: Any = None,
        pp_placeholder: Any = None,
    ) -> str:
        if self.loads_without_pieces and pp_placeholder is None:
            # There may have been fewer ranks; what is not in pieces is the same in every file.
            pp_placeholder = "0"
        return super()._get_ckpt_name(checkpoints_path, tag, mp_placeholder, pp_placeholder)

    def _get_non_moe_state_dict(self, full_state_dict: dict[str, Any]) -> dict[str, Any]:
        state = super()._get_non_moe_state_dict(full_state_dict)
        if self.placed_experts is not None:
            for name, _, _ in self.placed_experts.parameters(self.module):
                state.pop(name, None)
        return state

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's; refused where it would write a part of the experts."""
        if self.placed_experts is not None:
            raise CheckpointError(
                explain(
                    "this would write the experts of rank 0 only",
                    where="save_16bit_model",
                    do="Call semantic_ep.integrations.deepspeed.save_huggingface_checkpoint",
                )
            )
        return super().save_16bit_model(*args, **kwargs)
