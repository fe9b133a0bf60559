"""What observing a training run has in common, whatever the framework: recorder, hooks, profile.

A framework's subclass says where its routers are, which ranks count, and how its forward pass names
tokens; the rest is here.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from semantic_ep.artifacts import ModelFingerprint, hash_arrays
from semantic_ep.config.sections import ObserveConfig
from semantic_ep.observe.counters import CounterLimits
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.recorder import RoutingRecorder
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.runtime.collectives import from_all_ranks

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)

PROFILE_IN_CHECKPOINT = "routing_profile"


class RoutingObservation(ABC):
    """The recorder of one model, its hooks, and where its profile goes."""

    framework: str
    """Name that profiles are marked with."""

    def __init__(
        self,
        config: ObserveConfig,
        *,
        fingerprint: ModelFingerprint,
        vocab_size: int,
        group: dist.ProcessGroup,
        seed: int,
        **share: Any,
    ) -> None:
        """Set the recorder up; hooks are the subclass's.

        Args:
            config: `output` must name a directory.
            fingerprint: The model; the hash of its routers is taken anew at each save.
            vocab_size: Token ids (V).
            group: Ranks whose counts add up, on gloo: profiles are combined on the host.
            seed: Of the sampling of sequences: the same on ranks that see parts of the same ones.
            share: What of the model this rank counts, as `RoutingRecorder` takes it.
        """
        self._config, self._fingerprint, self._group = config, fingerprint, group
        halflife = config.halflife_steps
        self.recorder = RoutingRecorder(
            num_layers=fingerprint.num_layers,
            num_experts=fingerprint.num_experts,
            top_k=fingerprint.top_k,
            vocab_size=vocab_size,
            halflife_steps=None if halflife == "auto" else halflife,
            limits=CounterLimits(sample_tokens=config.sample_tokens),
            seed=seed,
            **share,
        )
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def router_weights(self) -> list[Tensor]:
        """[E, D] weight of each router of the model in layer order; may be collective."""

    @property
    def output(self) -> Path:
        """Where profiles are written."""
        return Path(self._config.output)

    def goes_on_here(self) -> bool:
        """Whether this rank takes over its share of a saved profile; one rank for each share."""
        return dist.get_rank() == 0

    def step(self) -> None:
        """The optimizer has stepped."""
        self.recorder.step()

    def fingerprint(self) -> ModelFingerprint:
        """The model with its routers as they are now; collective where `router_weights` is."""
        weights = (weight.detach().float().cpu().numpy() for weight in self.router_weights())
        return dataclasses.replace(self._fingerprint, router_sha256=hash_arrays(weights))

    def save(self, checkpoint: str | os.PathLike[str] | None = None) -> RoutingProfile | None:
        """Write the profile of all ranks; collective.

        Args:
            checkpoint: Directory of a checkpoint that gets a copy, to resume from.

        Returns:
            The profile on the rank that wrote it, None on the others.
        """
        fingerprint = self.fingerprint()
        profile = self.recorder.profile(
            fingerprint,
            group=self._group,
            min_count=self._config.min_count,
            meta={"framework": self.framework, "ranks": dist.get_world_size()},
        )
        trace = None
        if self._config.sample_tokens:
            trace = self.recorder.trace(fingerprint, group=self._group)
        # Several groups may see the same tokens; the one of rank 0 counts.
        if profile is None or dist.get_rank() != 0:
            return None
        output = self.output
        profile.save(output)
        if checkpoint is not None:
            profile.save(Path(checkpoint) / PROFILE_IN_CHECKPOINT)
        if trace is not None:
            trace.save(output.with_name(f"{output.name}-sample"))
        logger.info(
            "routing profile of %.0f tokens in %s; recorder holds %.1f MB; dropped mass <= %.2g",
            profile.tokens,
            output,
            self.recorder.counters.nbytes / 1e6,
            profile.dropped_mass.max(),
        )
        return profile

    def look(self) -> tuple[RoutingProfile, RoutingTrace, int] | None:
        """Profile so far, sampled sequences of the recorder's window, and all its tokens.

        Collective; None on all ranks but rank 0.
        """
        fingerprint = self.fingerprint()
        profile = self.recorder.profile(fingerprint, group=self._group)
        window = self.recorder.window(fingerprint, group=self._group)
        if profile is None or window is None or dist.get_rank() != 0:
            return None
        return profile, *window

    def restore(self, checkpoint: str | os.PathLike[str]) -> RoutingProfile | None:
        """Go on from the profile in a checkpoint, if it has one.

        Returns:
            It, on the ranks that take over its counts; None elsewhere, or without one.
        """
        saved = Path(checkpoint) / PROFILE_IN_CHECKPOINT
        if not self.goes_on_here() or not saved.exists():
            return None
        profile = RoutingProfile.read(saved)
        self.recorder.counters.restore(profile)
        return profile

    def detach(self) -> None:
        """Remove all hooks."""
        while self._handles:
            self._handles.pop().remove()


def group_on_host(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A gloo group of these ranks; collective over all ranks, each naming the group it is in."""
    mine = tuple(ranks)
    everyone = from_all_ranks(mine, "creation of groups on the host")
    group = None
    for members in sorted(set(everyone)):
        created = dist.new_group(list(members), backend="gloo")
        if members == mine:
            group = created
    assert group is not None
    return group


def sequence_numbers(position_ids: Any, token_id_BS: Tensor) -> Tensor:
    """[B, S] int32 number of each token's sequence: rows, cut where positions start again."""
    starts_BS = torch.zeros_like(token_id_BS, dtype=torch.int32)
    starts_BS[:, 0] = 1
    if isinstance(position_ids, Tensor) and position_ids.shape == token_id_BS.shape:
        starts_BS |= (position_ids == 0).to(torch.int32)
    return starts_BS.reshape(-1).cumsum(0, dtype=torch.int32).view_as(token_id_BS)


def experts_of_map(routed_TE: Tensor, top_k: int) -> Tensor:
    """[T, K] experts of a [T, E] bool routing map; -1 where a token reached fewer than K."""
    held, expert_TK = routed_TE.to(torch.uint8).topk(top_k, dim=1)
    return expert_TK.masked_fill(held == 0, -1)
