"""Hosts on slow links: network namespaces of one machine, joined by veth pairs with token buckets.

Two hosts are the two ends of one pair. More are ports of a bridge, which lives in a namespace of
its own, so that nothing is added to the network of the machine itself. All addresses are of the
block that RFC 2544 sets aside for benchmarks, and exist in the namespaces alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from semantic_ep.errors import BackendError, explain

INTERFACE = "eth0"
MASTER_PORT = 29500
# What a bucket lets through at once: as short as timers allow, so that small messages wait too.
_BURST_SECONDS = 130e-6
_SMALLEST_BURST = 4096
# Nothing is dropped: TCP bounds what it has under way.
_QUEUE_BYTES = 64 * 2**20
_KILL_SECONDS = 10.0

Command = list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """Names and addresses of the hosts.

    Attributes:
        hosts: How many.
        run: Part of every name; unique while the network exists.
    """

    hosts: int
    run: str

    @property
    def namespaces(self) -> list[str]:
        """One a host."""
        return [f"semantic-ep-{self.run}-host{host}" for host in range(self.hosts)]

    @property
    def switch(self) -> str | None:
        """Namespace of the bridge; None where a cable will do."""
        return f"semantic-ep-{self.run}-switch" if self.hosts > 2 else None

    def address(self, host: int) -> str:
        """IPv4 address of a host."""
        return f"198.18.0.{host + 1}"

    def shaped(self) -> list[tuple[str, str]]:
        """(namespace, interface) whose sending is limited: hosts', and a switch's ports."""
        ends = [(namespace, INTERFACE) for namespace in self.namespaces]
        if self.switch is not None:
            ends += [(self.switch, f"port{host}") for host in range(self.hosts)]
        return ends

    def setup(self) -> list[Command]:
        """Commands that make the hosts and connect them."""
        first, second, *_ = self.namespaces
        commands = [["ip", "netns", "add", name] for name in self._all()]
        if self.switch is None:
            commands.append(_veth((first, INTERFACE), (second, INTERFACE)))
        else:
            commands.append(["ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge"])
            commands.append(["ip", "-n", self.switch, "link", "set", "bridge", "up"])
            for host, namespace in enumerate(self.namespaces):
                port = f"port{host}"
                commands += [
                    _veth((namespace, INTERFACE), (self.switch, port)),
                    ["ip", "-n", self.switch, "link", "set", port, "master", "bridge", "up"],
                ]
        for host, namespace in enumerate(self.namespaces):
            in_host = ["ip", "-n", namespace]
            commands += [
                [*in_host, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE],
                [*in_host, "link", "set", "lo", "up"],
                [*in_host, "link", "set", INTERFACE, "up"],
            ]
        return commands

    def limit(self, gigabits: float | None) -> list[Command]:
        """Commands that limit what every end sends, or (None) only count it."""
        return [
            [
                *("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root"),
                *(["pfifo", "limit", "10000"] if gigabits is None else _token_bucket(gigabits)),
            ]
            for namespace, interface in self.shaped()
        ]

    def teardown(self) -> list[Command]:
        """Commands that remove everything; interfaces go with their namespaces."""
        return [["ip", "netns", "delete", name] for name in self._all()]

    def launch(
        self, host: int, *, hostfile: Path, module: str, arguments: Sequence[str]
    ) -> Command:
        """What starts a host's rank: the command of a cluster whose nodes have no ssh."""
        return [
            *("ip", "netns", "exec", self.namespaces[host]),
            *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)),
            *("--no_ssh", "--node_rank", str(host), "--master_addr", self.address(0)),
            *("--master_port", str(MASTER_PORT), "--no_local_rank", "--log_level", "warning"),
            *("--module", module, *arguments),
        ]

    def hostfile(self) -> str:
        """Content of DeepSpeed's hostfile: one rank a host."""
        return "".join(f"host{host} slots=1\n" for host in range(self.hosts))

    def _all(self) -> list[str]:
        return [*self.namespaces, *([self.switch] if self.switch else [])]


def burst_bytes(gigabits: float) -> int:
    """Size of the token bucket of a link."""
    return max(round(gigabits * 1e9 / 8 * _BURST_SECONDS), _SMALLEST_BURST)


def _token_bucket(gigabits: float) -> list[str]:
    return [
        *("tbf", "rate", f"{round(gigabits * 1e9)}bit"),
        *("burst", str(burst_bytes(gigabits)), "limit", str(_QUEUE_BYTES)),
    ]


def _veth(first: tuple[str, str], second: tuple[str, str]) -> Command:
    """A cable between two interfaces, given as (namespace, name)."""
    return [
        *("ip", "link", "add", first[1], "netns", first[0], "type", "veth"),
        *("peer", "name", second[1], "netns", second[0]),
    ]


def why_not() -> str | None:
    """Why hosts cannot be made here, found out by making two; None if they can."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found (Debian's package: iproute2)"
    try:
        with connected(2) as network:
            execute(network.limit(1.0))
    except BackendError as error:
        return f"network namespaces with limited links are not permitted here: {error}"
    return None


@contextlib.contextmanager
def connected(hosts: int) -> Iterator[Network]:
    """Make hosts, and remove them however the block ends, with what still runs in them.

    Raises:
        BackendError: This machine, or this user, cannot.
    """
    network = Network(hosts=hosts, run=str(os.getpid()))
    try:
        execute(network.setup())
        yield network
    finally:
        _remove(network)


def execute(commands: Sequence[Command]) -> None:
    """Run one command after the other.

    Raises:
        BackendError: One failed.
    """
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BackendError(
                explain(
                    "the network of the hosts cannot be set up",
                    where=" ".join(command),
                    got=done.stderr.strip(),
                    do="It takes root, or CAP_NET_ADMIN and CAP_SYS_ADMIN, on Linux",
                )
            )


def _remove(network: Network) -> None:
    for namespace in network.namespaces:
        found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
        for process in map(int, found.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    for command in network.teardown():
        # What was never made cannot be removed, and must not hide why it was not.
        subprocess.run(command, capture_output=True)


def run_on_hosts(
    network: Network, *, folder: Path, module: str, arguments: Sequence[str], seconds: float
) -> None:
    """Run a module as one rank a host, and wait for all.

    Args:
        network: The hosts.
        folder: Gets the hostfile and one log a host.
        module: Of the ranks, in this checkout.
        arguments: Of the module.
        seconds: After which the ranks are ended, which is an error.

    Raises:
        BackendError: A rank failed or none ended in time; with the end of its log.
    """
    hostfile = folder / "hostfile"
    hostfile.write_text(network.hostfile())
    logs = [folder / f"host{host}.log" for host in range(network.hosts)]
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    running: list[subprocess.Popen[bytes]] = []
    try:
        for host, log in enumerate(logs):
            command = network.launch(host, hostfile=hostfile, module=module, arguments=arguments)
            with log.open("wb") as stream:
                running.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        failed = _wait(running, seconds)
    finally:
        _end(running)
    if failed is not None:
        host, why = failed
        tail = "\n".join(logs[host].read_text(errors="replace").splitlines()[-15:])
        raise BackendError(
            explain(f"host {host} {why}", where=module, got=f"its log ends:\n{tail}")
        )


def _wait(running: Sequence[subprocess.Popen[bytes]], seconds: float) -> tuple[int, str] | None:
    """(host, what went wrong) of the first that failed; None once all have ended well."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        codes = [process.poll() for process in running]
        for host, code in enumerate(codes):
            if code:
                return host, f"ended with exit code {code}"
        if None not in codes:
            return None
        time.sleep(0.1)
    host = next(host for host, process in enumerate(running) if process.poll() is None)
    return host, f"has not ended within {seconds:.0f} s"


def _end(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """End launchers and ranks: each launcher leads a session that holds its rank."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _KILL_SECONDS
        for process in running:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
