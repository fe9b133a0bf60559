import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ep.cli import main
from semantic_ep.errors import ConfigError
from semantic_ep.runtime.grid import DENSE_KINDS, EXPERT_KINDS
from semantic_ep.runtime.groups import GroupPlan
from semantic_ep.topology import Topology

KINDS = DENSE_KINDS | EXPERT_KINDS


def factorizations(world, parts):
    """Every way to write `world` as a product of `parts` factors, in order."""
    if parts == 1:
        yield (world,)
        return
    for first in range(1, world + 1):
        if world % first == 0:
            for rest in factorizations(world // first, parts - 1):
                yield (first, *rest)


def layouts(world):
    """(tp, cp, pp, ep, etp) in which every dense grid and every grid of experts occurs.

    The two depend on each other through the pipeline size only, so not all pairs are needed.
    """
    for pp in (n for n in range(1, world + 1) if world % n == 0):
        thirds = list(factorizations(world // pp, 3))
        for (tp, cp, _), (ep, etp, _) in zip(thirds, thirds[1:] + thirds[:1], strict=True):
            yield tp, cp, pp, ep, etp


def plan_of(world, tp, cp, pp, ep, etp, **settings):
    return GroupPlan.build(
        world,
        ep,
        tensor_parallel=tp,
        context_parallel=cp,
        pipeline_parallel=pp,
        expert_tensor_parallel=etp,
        **settings,
    )


def check(plan):
    """Each rank is in one group of each kind, of the right size, and the grids agree."""
    sizes = plan.sizes
    along = {
        "tp": sizes.tensor,
        "cp": sizes.context,
        "dp": sizes.data,
        "pp": sizes.pipeline,
        "ep": sizes.expert,
        "expt_tp": sizes.expert_tensor,
        "expt_dp": sizes.expert_data,
    }
    for kind, axes in KINDS.items():
        groups = np.array(plan.groups(kind))
        assert groups.shape[1] == math.prod(along[axis] for axis in axes)
        assert np.array_equal(np.sort(groups.ravel()), np.arange(plan.world_size))
        assert (np.diff(groups, axis=1) > 0).all()
    stage = np.arange(plan.world_size) // sizes.stage
    for kind in ("tp_dp_cp", "ep", "expt_tp", "expt_dp", "tp_ep"):
        assert (np.ptp(stage[np.array(plan.groups(kind))], axis=1) == 0).all()
    # Megatron reads this group as [EP, ETP]; every group of the whole holds all places.
    grids = np.array(plan.groups("tp_ep")).reshape(-1, sizes.expert, sizes.expert_tensor)
    assert sorted(map(tuple, grids.reshape(-1, sizes.expert_tensor).tolist())) == sorted(
        plan.groups("expt_tp")
    )
    assert sorted(map(tuple, grids.transpose(0, 2, 1).reshape(-1, sizes.expert).tolist())) == (
        sorted(plan.groups("ep"))
    )
    place = np.empty(plan.world_size, dtype=int)
    place[grids] = np.arange(sizes.expert * sizes.expert_tensor).reshape(grids.shape[1:])
    for kind in ("expt_dp", "pp"):
        assert (np.ptp(place[np.array(plan.groups(kind))], axis=1) == 0).all()


def test_eight_ranks_in_two_groups_of_four():
    plan = GroupPlan.build(8, 4)
    assert plan.expert_parallel == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert plan.expert_data_parallel == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert plan.expert_parallel_group(6) == (4, 5, 6, 7)


def test_groups_stay_inside_nodes_even_when_ranks_alternate_between_them():
    topology = Topology(node_of_rank=(0, 1, 0, 1))
    by_node = GroupPlan.build(4, 2, topology=topology)
    assert by_node.expert_parallel == ((0, 2), (1, 3))
    assert by_node.crossing_nodes("ep") == 0
    straddling = GroupPlan.build(4, 2, topology=topology, scope="global")
    assert straddling.expert_parallel == ((0, 1), (2, 3))
    assert straddling.nodes_of_group(0).tolist() == [0, 1]
    assert straddling.crossing_nodes("ep") == 2


def test_every_legal_combination_of_sizes_up_to_64_ranks_gives_consistent_groups():
    for world in range(1, 65):
        for layout in layouts(world):
            check(plan_of(world, *layout, scope="global"))


@given(
    data=st.data(),
    on_node=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    pipeline=st.sampled_from([1, 2, 4]),
)
def test_groups_by_node_are_consistent_and_cross_nodes_only_where_they_must(
    data, on_node, pipeline
):
    stage = data.draw(st.permutations([n for n, count in enumerate(on_node) for _ in range(count)]))
    # Stages on the same nodes, or each on nodes of its own.
    apart = data.draw(st.booleans()) * len(on_node)
    nodes = tuple(node + number * apart for number in range(pipeline) for node in stage)
    tp, cp, _ = data.draw(st.sampled_from(list(factorizations(len(stage), 3))))
    ep, etp, _ = data.draw(st.sampled_from(list(factorizations(len(stage), 3))))
    topology = Topology(node_of_rank=nodes)
    try:
        plan = plan_of(len(nodes), tp, cp, pipeline, ep, etp, topology=topology)
    except ConfigError:
        fits = [
            n % (ep * etp) == 0 if ep * etp <= max(on_node) else ep * etp % n == 0 for n in on_node
        ]
        assert not all(fits) or (etp > 1 and list(stage) != sorted(stage))
        return
    check(plan)
    if ep * etp <= max(on_node):
        assert plan.crossing_nodes("tp_ep") == 0
    if etp <= min(on_node):
        assert plan.crossing_nodes("expt_tp") == 0
    if list(stage) == sorted(stage):
        megatrons = plan_of(
            len(nodes), tp, cp, pipeline, ep, etp, topology=topology, scope="global"
        )
        assert all(plan.groups(kind) == megatrons.groups(kind) for kind in KINDS)


@pytest.mark.parametrize(
    ("world", "ep_size", "settings", "match"),
    [
        (8, 3, {}, "ep_size = 3 does not divide the world size 8.*Allowed: 1, 2, 4, 8"),
        (8, 0, {}, "does not divide"),
        (
            8,
            4,
            {"pipeline_parallel": 2, "expert_tensor_parallel": 2},
            "ep_size = 4 times expert_tensor 2 x pipeline 2 does not divide.*Allowed: 1, 2",
        ),
        (8, 2, {"tensor_parallel": 3, "expert_tensor_parallel": 1}, "tensor = 3 does not divide"),
        (8, 2, {"expert_tensor_parallel": 0}, "does not divide"),
        (8, 4, {"topology": Topology.uniform(4)}, "topology has 4 ranks and the job 8"),
        (12, 4, {"topology": Topology.uniform(12, num_nodes=2)}, "cannot keep groups inside nodes"),
        (
            8,
            2,
            {"topology": Topology(node_of_rank=(0, 0, 1, 1, 0, 1, 0, 1)), "pipeline_parallel": 2},
            r"nodes \[0, 0, 1, 1\] of stage 0, \[0, 1, 0, 1\] of 1",
        ),
        (
            4,
            2,
            {"topology": Topology(node_of_rank=(0, 1, 0, 1)), "expert_tensor_parallel": 2},
            "alternate between nodes",
        ),
    ],
)
def test_impossible_groups_are_refused_with_the_sizes(world, ep_size, settings, match):
    with pytest.raises(ConfigError, match=match):
        GroupPlan.build(world, ep_size, **settings)


def test_the_command_line_shows_the_groups_of_a_job_that_does_not_run(tmp_path, capsys):
    sizes = ["--world-size", "8", "--expert-parallel", "2", "--pipeline-parallel", "2"]
    command = ["simulate", "groups", *sizes, "--nodes", "2", "--distribution", "cyclic"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "expert parallel 0: ranks 0 2 (nodes 0)" in shown
    assert "expert tensor parallel 0" not in shown
    assert "cross nodes: 0 of 4; in the order of ranks: 4 of 4" in shown
    assert main([*command, "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    plan = plan_of(8, 1, 1, 2, 2, 1, topology=Topology(node_of_rank=(0, 1) * 4))
    assert set(account["groups"]) == set(KINDS)
    for kind, found in account["groups"].items():
        assert found["ranks"] == [list(group) for group in plan.groups(kind)]
        assert found["crossing_nodes"] == plan.crossing_nodes(kind)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("a slots=5\nb slots=3\n")
    assert main(["simulate", "groups", *sizes, "--hostfile", str(hostfile)]) == 2
    assert "pipeline stages lie on nodes in different ways" in capsys.readouterr().err
    refused = [*sizes, "--hostfile", str(hostfile), "--scope", "global", "--json"]
    assert main(["simulate", "groups", *refused]) == 0
    assert json.loads(capsys.readouterr().out)["groups"]["ep"]["crossing_nodes"] == 1
