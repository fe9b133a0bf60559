"""The published placements that a plan is compared with, and starts from."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.policies import policy
from semantic_ep.plan.router_groups import mixed_blocks
from semantic_ep.topology import Topology

logger = logging.getLogger(__name__)

# All that hold each expert once; quick ones first, since time may run out.
BASELINES = (
    *("contiguous", "random", "greedy", "eplb", "eplb-global", "occult", "grace"),
    *("exflow", "moetuner", "semmoe"),
)
_OF_LOAD = ("contiguous", "random", "greedy", "eplb", "eplb-global")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """Placements of baselines.

    Attributes:
        placements: By name.
        seconds: Wall time of each.
        left_out: Why there is no placement, by name of those without.
    """

    placements: dict[str, Placement]
    seconds: dict[str, float]
    left_out: dict[str, str]

    @property
    def even(self) -> tuple[Placement, ...]:
        """Those with equally many experts on every rank, as training runtimes need."""
        return tuple(placed for placed in self.placements.values() if is_even(placed))


def is_even(placement: Placement) -> bool:
    """Whether every rank holds equally many experts, each expert being held once."""
    return placement.slots_per_rank * placement.ep_size == placement.num_experts


def place_baselines(
    profile: RoutingProfile,
    names: Sequence[str],
    *,
    ep_size: int,
    seed: int = 0,
    time_limit: float | None = None,
    topology: Topology | None = None,
    router_groups: int = 1,
) -> Compared:
    """Place by every baseline named, in the order of `BASELINES`.

    Args:
        profile: Routing counts to plan on.
        names: Some of `BASELINES`; contiguous placement always comes along.
        ep_size: EP ranks (G).
        seed: Seed of those that draw.
        time_limit: Seconds for all of them together. One that is running ends by its own rule, if
            it has none for time; those that have not begun by then are left out.
        topology: Nodes of the ranks.
        router_groups: Router groups to keep whole; placements that break them are left out.

    Returns:
        Placements, and what was left out and why. Ctrl-C leaves out the rest.
    """
    found = Compared(placements={}, seconds={}, left_out={})
    begun = time.perf_counter()
    stopped = ""
    for name in BASELINES:
        started = time.perf_counter()
        left = None if time_limit is None else time_limit - (started - begun)
        if name not in names and name != "contiguous":
            why = "not asked for"
        elif name not in _OF_LOAD and not profile.coactivation.any():
            why = "the profile knows no experts that are used together"
        elif name == "semmoe" and not profile.token_count.any():
            why = "the profile knows no token ids"
        elif left is not None and left <= 0 and name != "contiguous":
            why = f"the time limit of {time_limit:g} s was used up"
        else:
            why = stopped
        if why:
            found.left_out[name] = why
            continue
        try:
            placed = policy(name).place(
                profile, ep_size=ep_size, seed=seed, time_limit=left, topology=topology
            )
        except KeyboardInterrupt:
            logger.warning("interrupted: comparing without %s and what follows it", name)
            stopped = found.left_out[name] = "interrupted"
            continue
        table = placed.physical_to_logical_map
        broken = router_groups > 1 and (
            not is_even(placed) or mixed_blocks(table, router_groups).size
        )
        if broken:
            found.left_out[name] = f"it breaks the {router_groups} router groups"
        else:
            found.placements[name] = placed
            found.seconds[name] = time.perf_counter() - started
    return found
