from __future__ import annotations

import json
from pathlib import Path

import pytest

from semantic_ep.errors import ConfigError
from semantic_ep.topology import LINKS, Topology

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "topology").glob("*.json"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_topologies_load(file):
    assert Topology.from_json(file).ep_size >= 8


def test_json_takes_links_by_name_or_by_figures(tmp_path):
    file = tmp_path / "t.json"
    own = {"name": "measured", "gigabytes_per_second": 7.5, "latency_microseconds": 3}
    file.write_text(
        json.dumps({"ranks_per_node": [2, 1], "intra_node": "pcie5", "inter_node": own})
    )
    topology = Topology.from_json(file)
    assert topology.node_of_rank == (0, 0, 1)
    assert topology.intra_node == LINKS["pcie5"]
    assert topology.inter_node.gigabytes_per_second == 7.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("{}", "ranks_per_node"),
        ('{"ranks_per_node": [8], "intranode": "nvlink4"}', "intranode"),
        ('{"ranks_per_node": [0]}', "positive integers"),
        ('{"ranks_per_node": [8], "intra_node": "nvlink"}', 'Did you mean "nvlink'),
        ('{"ranks_per_node": [8], "intra_node": {"name": "x"}}', "gigabytes_per_second"),
    ],
)
def test_a_bad_json_is_refused_with_the_file_and_the_reason(tmp_path, content, message):
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        Topology.from_json(file)
    assert str(file) in str(raised.value)


def test_a_hostfile_gives_ranks_in_its_order(tmp_path):
    file = tmp_path / "hostfile"
    file.write_text("# cluster\nnode-a slots=2\n\nnode-b slots=3 # spare\n")
    assert Topology.from_hostfile(file).node_of_rank == (0, 0, 1, 1, 1)


@pytest.mark.parametrize("line", ["node-a", "node-a slots=0", "node-a slots=two"])
def test_a_bad_hostfile_line_is_named(tmp_path, line):
    file = tmp_path / "hostfile"
    file.write_text(f"ok slots=1\n{line}\n")
    with pytest.raises(ConfigError, match="hostfile:2"):
        Topology.from_hostfile(file)


def test_slurm_repetitions_are_expanded():
    topology = Topology.from_slurm({"SLURM_TASKS_PER_NODE": "2(x2),1"})
    assert topology.node_of_rank == (0, 0, 1, 1, 2)
    with pytest.raises(ConfigError, match="SLURM_TASKS_PER_NODE"):
        Topology.from_slurm({})
    with pytest.raises(ConfigError, match=r"2\(y2\)"):
        Topology.from_slurm({"SLURM_TASKS_PER_NODE": "2(y2)"})


def test_uneven_spreading_and_too_few_ranks_are_refused():
    with pytest.raises(ConfigError, match="evenly"):
        Topology.uniform(6, num_nodes=4)
    with pytest.raises(ConfigError, match="fewer ranks"):
        Topology.uniform(4).first(8)
    with pytest.raises(ConfigError, match="without a gap"):
        Topology(node_of_rank=(0, 2))
    assert Topology.uniform(8, num_nodes=2).first(4).num_nodes == 1


def test_ranks_dealt_in_turn_fill_the_same_nodes():
    assert Topology(node_of_rank=(0, 0, 0, 1)).dealt_in_turn().node_of_rank == (0, 1, 0, 0)
