"""The one interface that our solver and every baseline share, and their registry."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from semantic_ep.errors import ConfigError, explain, nearest
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.placement import Placement
from semantic_ep.topology import Topology


@runtime_checkable
class PlacementPolicy(Protocol):
    """Chooses a placement from a routing profile."""

    @property
    def name(self) -> str:
        """Its name on the command line and in tables."""
        ...

    def place(
        self,
        profile: RoutingProfile,
        *,
        ep_size: int,
        seed: int = 0,
        time_limit: float | None = None,
        topology: Topology | None = None,
    ) -> Placement:
        """Return a valid placement of the profile's L x E experts on `ep_size` ranks.

        Args:
            profile: Routing counts to plan on.
            ep_size: EP ranks (G).
            seed: Same seed, same profile, same placement, unless `time_limit` cut the search.
            time_limit: Seconds after which the best placement so far is returned; None for the
                policy's own stopping rule.
            topology: Nodes and links of the ranks; None means one node.

        Raises:
            PlacementError: `ep_size` does not suit the number of experts.
        """
        ...


_REGISTRY: dict[str, PlacementPolicy] = {}


def register(policy: PlacementPolicy) -> PlacementPolicy:
    """Make a policy known under its name; a name may be taken once."""
    assert policy.name not in _REGISTRY, f"policy {policy.name} is registered twice"
    _REGISTRY[policy.name] = policy
    return policy


def policies() -> dict[str, PlacementPolicy]:
    """Return all policies by name: the baselines and our solver."""
    _load_builtin()
    return dict(_REGISTRY)


def policy(name: str) -> PlacementPolicy:
    """Return the policy of that name.

    Raises:
        ConfigError: There is none; the message names the closest one.
    """
    known = policies()
    if name not in known:
        close = nearest(name, known)
        raise ConfigError(
            explain(
                "unknown placement policy",
                where="--policy",
                got=name,
                allowed=sorted(known),
                do=f'Did you mean "{close}"?' if close else "Choose one of them",
            )
        )
    return known[name]


def _load_builtin() -> None:
    """Import the modules that register policies; they import this one, hence not at the top."""
    import semantic_ep.plan.baselines
    import semantic_ep.plan.solver  # noqa: F401
