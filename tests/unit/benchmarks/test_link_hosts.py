"""Hosts as network namespaces: names, addresses and commands, and that nothing stays behind."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
import time

import pytest

from benchmarks import link_hosts
from benchmarks.link_hosts import Network, burst_bytes, connected, run_on_hosts, why_not
from semantic_ep.errors import BackendError


@pytest.fixture(scope="module")
def namespaces():
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


def existing():
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in listed.stdout.splitlines()}


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_have_addresses_for_benchmarks_and_everything_made_is_removed(hosts):
    network = Network(hosts=hosts, run="7")
    reserved = ipaddress.ip_network("198.18.0.0/15")
    addresses = {ipaddress.ip_address(network.address(host)) for host in range(hosts)}
    assert len(addresses) == hosts
    assert all(address in reserved for address in addresses)
    made = [c[-1] for c in network.setup() if c[:3] == ["ip", "netns", "add"]]
    removed = [c[-1] for c in network.teardown()]
    assert sorted(made) == sorted(removed)
    assert len(made) == hosts + (hosts > 2)
    # Nothing is made in the machine's own network: every other command names a namespace.
    for command in network.setup()[len(made) :]:
        assert command[2] in made or command[5] in made


def test_two_runs_share_no_name():
    first, second = (Network(hosts=4, run=run) for run in ("1", "2"))
    assert not {*first.namespaces, first.switch} & {*second.namespaces, second.switch}


def test_links_are_limited_at_every_end_that_sends():
    pair, star = Network(hosts=2, run="7"), Network(hosts=4, run="7")
    assert [command[6] for command in pair.limit(1.0)] == ["eth0", "eth0"]
    ports = [f"port{host}" for host in range(4)]
    assert [command[6] for command in star.limit(1.0)] == ["eth0"] * 4 + ports
    assert "1000000000bit" in star.limit(1.0)[0]
    assert "tbf" not in star.limit(None)[0]


def test_a_bucket_holds_at_least_two_packets_and_otherwise_grows_with_the_rate():
    assert burst_bytes(0.001) == burst_bytes(0.1) > 2 * 1514
    assert burst_bytes(10) == pytest.approx(10 * burst_bytes(1), abs=10)


def test_every_host_starts_its_rank_with_deepspeed_from_one_hostfile(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    network = Network(hosts=3, run="7")
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(network.hostfile())
    assert fetch_hostfile(str(hostfile)) == {"host0": 1, "host1": 1, "host2": 1}
    for host in range(3):
        command = network.launch(host, hostfile=hostfile, module="some.module", arguments=["x"])
        assert command[:4] == ["ip", "netns", "exec", network.namespaces[host]]
        parsed = parse_args(command[command.index("deepspeed.launcher.runner") + 1 :])
        assert (parsed.node_rank, parsed.master_addr) == (host, network.address(0))
        assert (parsed.user_script, parsed.user_args) == ("some.module", ["x"])
        assert parsed.module
        assert parsed.no_ssh


def test_a_missing_tool_is_the_reason(monkeypatch):
    monkeypatch.setattr(link_hosts.shutil, "which", lambda tool: None if tool == "tc" else tool)
    assert why_not() == "tc not found (Debian's package: iproute2)"


def test_what_is_refused_says_which_command_and_why(namespaces):
    with pytest.raises(BackendError, match="ip -n semantic-ep-no-such-namespace link show"):
        link_hosts.execute([["ip", "-n", "semantic-ep-no-such-namespace", "link", "show"]])


def processes(namespace):
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, check=True)
    return found.stdout.split()


def interrupted(network, started):
    names = {*network.namespaces, network.switch}
    assert names <= existing()
    started += [names, subprocess.Popen(["ip", "netns", "exec", min(names), "sleep", "600"])]
    while not processes(min(names)):
        time.sleep(0.01)
    raise KeyboardInterrupt


def test_hosts_are_gone_after_an_interrupt_with_what_ran_in_them(namespaces):
    started = []
    with pytest.raises(KeyboardInterrupt), connected(4) as network:
        interrupted(network, started)
    names, sleeper = started
    assert not names & existing()
    assert sleeper.wait(timeout=20) != 0


def test_a_rank_that_fails_or_hangs_ends_the_others_and_its_log_is_shown(
    namespaces, tmp_path, monkeypatch
):
    def command(self, host, **_):
        code = "import time; time.sleep(600)" if host in slow else "raise SystemExit('bad luck')"
        return ["ip", "netns", "exec", self.namespaces[host], sys.executable, "-c", code]

    monkeypatch.setattr(Network, "launch", command)
    rank = {"folder": tmp_path, "module": "ranks", "arguments": []}
    with connected(2) as network:
        slow = {1}
        with pytest.raises(BackendError, match=r"(?s)host 0 ended with exit code 1.*bad luck"):
            run_on_hosts(network, seconds=60, **rank)
        slow = {0, 1}
        with pytest.raises(BackendError, match="host 0 has not ended within 1 s"):
            run_on_hosts(network, seconds=1, **rank)
        assert not any(processes(namespace) for namespace in network.namespaces)
