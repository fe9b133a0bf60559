"""`semantic-ep serve`: start the ranks of an HTTP server on this machine, and watch over them."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

logger = logging.getLogger(__name__)

MODULE = "semantic_ep.serve.http"
# A group that ends sooner than this after its start will hardly live longer next time.
_LIVED_SECONDS = 60.0
_MAX_EARLY_ENDS = 3
_POLL_SECONDS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    from semantic_ep.serve.arguments import add_server_arguments

    _add_own_arguments(parser)
    add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; the exit code of the ranks, 0 if they were told to stop."""
    _check_installed()
    ranks = _num_ranks(args)
    supervisor = Supervisor(ranks, _of_the_server(args.arguments))
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, supervisor.stop)
    return supervisor.run(restart=args.restart)


class Supervisor:
    """Runs the ranks as child processes, again and again if asked to.

    Args:
        ranks: How many; one runs without a launcher.
        arguments: Of the server.
    """

    def __init__(self, ranks: int, arguments: Sequence[str]) -> None:
        self._ranks = ranks
        self._arguments = list(arguments)
        self._stopped_by: int | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def run(self, *, restart: bool) -> int:
        """Start the ranks and wait for them; returns an exit code."""
        early_ends = 0
        while True:
            start = time.monotonic()
            code = self._run_once()
            if self._stopped_by is not None:
                return 0
            if code == 0 or not restart:
                return code
            early_ends = early_ends + 1 if time.monotonic() - start < _LIVED_SECONDS else 0
            if early_ends >= _MAX_EARLY_ENDS:
                logger.error("the ranks ended early %d times in a row; giving up", early_ends)
                return code
            logger.error("the ranks ended with code %d; starting them again", code)

    def stop(self, sig: int, frame: FrameType | None) -> None:
        """Pass a signal on: the server drains. Runs in the main thread, between instructions."""
        self._stopped_by = sig
        if self._child is not None:
            self._signal(sig)

    def _run_once(self) -> int:
        # A session of its own: the terminal's interrupt reaches the ranks through `stop` alone.
        self._child = subprocess.Popen(
            command(self._ranks, self._arguments, port := free_port()),
            env=os.environ | ({} if self._ranks > 1 else _alone(port)),
            start_new_session=True,
        )
        if self._stopped_by is not None:  # while the child was being made
            self._signal(self._stopped_by)
        try:
            code = self._child.wait()
        finally:
            if self._child.poll() is None:
                self._child.kill()
        return code if code >= 0 else 128 - code

    def _signal(self, sig: int) -> None:
        assert self._child is not None
        if self._ranks == 1:
            self._child.send_signal(sig)
            return
        # `deepspeed` does not pass signals on to the process that watches the ranks, its child.
        import psutil

        try:
            children = psutil.Process(self._child.pid).children()
        except psutil.NoSuchProcess:
            return
        for process in children:
            try:
                process.send_signal(signal.SIGTERM)
            except psutil.NoSuchProcess:
                continue
        if not children:
            self._child.send_signal(sig)


def command(ranks: int, arguments: Sequence[str], port: int) -> list[str]:
    """What runs the ranks."""
    if ranks == 1:
        return [sys.executable, "-m", MODULE, *arguments]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
    where = ["--num_gpus", str(ranks), "--master_port", str(port)]
    return [*runner, *where, "--module", MODULE, *arguments]


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _add_own_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-ranks", type=int, metavar="G", help="default: as the plan or the settings say, or 1"
    )
    parser.add_argument(
        "--restart", action="store_true", help="start all ranks again when one is lost"
    )


def _of_the_server(arguments: Sequence[str]) -> list[str]:
    """The command line without what belongs to this verb."""
    # The verb's parser takes shortened flags, and has refused those that could be another's.
    own = argparse.ArgumentParser(add_help=False)
    _add_own_arguments(own)
    own.add_argument("-v", "--verbose", action="store_true")
    rest = own.parse_known_args(list(arguments))[1]
    rest.remove("serve")
    return rest


def _check_installed() -> None:
    """Raise `ConfigError` if a package of the extras is missing, before ranks are started."""
    from importlib.util import find_spec

    from semantic_ep.errors import ConfigError, explain

    needed = ("deepspeed", "transformers", "fastapi", "uvicorn", "prometheus_client", "psutil")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ConfigError(
            explain(
                f"the server needs packages that are not installed: {', '.join(missing)}",
                do="pip install 'semantic_ep[deepspeed,serve]'",
            )
        )


def _num_ranks(args: argparse.Namespace) -> int:
    """Ranks to start.

    Raises:
        ConfigError, ArtifactError: Settings or plan cannot be read; or there are fewer than one.
    """
    import json

    from semantic_ep.config import SemanticEPConfig, section_of
    from semantic_ep.errors import ConfigError, explain
    from semantic_ep.plan.plan import Plan

    section = None
    if args.deepspeed_config is not None:
        try:
            section = section_of(json.loads(args.deepspeed_config.read_text()))
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(
                explain(f"cannot read this file: {error}", where=str(args.deepspeed_config))
            ) from error
    settings = SemanticEPConfig.resolve(json_section=section, args=args)
    ranks = args.num_ranks
    if ranks is None and settings.groups.ep_size != "auto":
        ranks = settings.groups.ep_size
    if ranks is None:
        plan = args.plan or settings.plan.artifact
        ranks = 1 if plan == "auto" else Plan.read(plan).placement.ep_size
    if ranks < 1:
        raise ConfigError(explain("must be at least 1", where="--num-ranks", got=ranks))
    return int(ranks)


def _alone(port: int) -> dict[str, str]:
    """What a launcher tells a rank that has no peers."""
    numbers = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_SIZE": 1, "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
