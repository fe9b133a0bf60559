import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ep.errors import ConfigError
from semantic_ep.runtime.groups import GroupPlan
from semantic_ep.topology import Topology


def test_eight_ranks_in_two_groups_of_four():
    plan = GroupPlan.build(8, 4)
    assert plan.expert_parallel == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert plan.expert_data_parallel == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert plan.expert_parallel_group(6) == (4, 5, 6, 7)
    assert "expert parallel: ranks 4 5 6 7 (nodes 0)" in plan.describe()


def test_groups_stay_inside_nodes_even_when_ranks_alternate_between_them():
    topology = Topology(node_of_rank=(0, 1, 0, 1))
    assert GroupPlan.build(4, 2, topology=topology).expert_parallel == ((0, 2), (1, 3))
    straddling = GroupPlan.build(4, 2, topology=topology, scope="global")
    assert straddling.expert_parallel == ((0, 1), (2, 3))
    assert straddling.nodes_of_group(0).tolist() == [0, 1]


@given(
    nodes=st.integers(1, 4),
    per_node=st.integers(1, 8),
    data=st.data(),
    scope=st.sampled_from(["node", "global"]),
)
def test_every_rank_is_in_one_group_of_each_kind_and_the_two_meet_once(
    nodes, per_node, data, scope
):
    world = nodes * per_node
    ep_size = data.draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
    topology = Topology.uniform(world, num_nodes=nodes)
    try:
        plan = GroupPlan.build(world, ep_size, topology=topology, scope=scope)
    except ConfigError:
        assert scope == "node"
        assert (per_node % ep_size if ep_size <= per_node else ep_size % per_node) != 0
        return
    for groups in (plan.expert_parallel, plan.expert_data_parallel):
        assert sorted(rank for group in groups for rank in group) == list(range(world))
        assert all(list(group) == sorted(group) for group in groups)
    for together in plan.expert_parallel:
        for replicas in plan.expert_data_parallel:
            assert len(set(together) & set(replicas)) == 1
    if scope == "node" and ep_size <= per_node:
        assert all(len(np.unique(plan.nodes_of_group(g[0]))) == 1 for g in plan.expert_parallel)


@pytest.mark.parametrize(
    ("world", "ep_size", "topology", "match"),
    [
        (8, 3, None, "does not divide the world size 8.*Allowed: 1, 2, 4, 8"),
        (8, 0, None, "does not divide"),
        (8, 4, Topology.uniform(4), "topology has 4 ranks and the job 8"),
        (12, 4, Topology.uniform(12, num_nodes=2), "cannot keep groups inside nodes"),
    ],
)
def test_impossible_groups_are_refused_with_the_sizes(world, ep_size, topology, match):
    with pytest.raises(ConfigError, match=match):
        GroupPlan.build(world, ep_size, topology=topology)
