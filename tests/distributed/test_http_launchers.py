"""Servers as users start them: through `semantic-ep serve` and through the deepspeed launcher."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

httpx = pytest.importorskip("httpx")
psutil = pytest.importorskip("psutil")
pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from tests.distributed.http_server import arguments, is_ready, save_byte_model, wait_until
from tests.distributed.test_serve_launch import free_port

REPO = Path(__file__).parents[2]
SLOW = {"model": "tiny", "prompt": "a", "max_tokens": 480, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("http") / "tiny"
    save_byte_model(path)
    return path


class Launched:
    """A command that starts a server of two ranks, and all processes below it."""

    def __init__(self, model, *command):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = model.parent / f"log-{port}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *arguments(model, port)],
                env={
                    **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
                    "DS_ACCELERATOR": "cpu",
                    "CUDA_VISIBLE_DEVICES": "",
                    "OMP_NUM_THREADS": "1",
                },
                cwd=REPO,
                stderr=log,
                stdout=log,
            )

    def wait_until_ready(self):
        wait_until(
            lambda: is_ready(self.url),
            seconds=240,
            alive=lambda: self.process.poll() is None,
            said=self.log.read_text,
        )

    def rank(self, number):
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if process.environ().get("RANK") == str(number):
                return process
        raise AssertionError(f"no rank {number}")

    def end(self):
        if self.process.poll() is None:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
            self.process.kill()
            self.process.wait()


@pytest.fixture
def launched(model):
    started = []

    def launch(*command):
        started.append(Launched(model, *command))
        started[-1].wait_until_ready()
        return started[-1]

    yield launch
    for one in started:
        one.end()


@contextlib.contextmanager
def clients_being_served(server, count):
    """Long requests, which the engine is working on; their answers are there in the end."""
    answers = []

    def ask():
        answers.append(httpx.post(f"{server.url}/v1/completions", json=SLOW, timeout=120))

    def all_running():
        told = httpx.get(f"{server.url}/metrics").text
        (running,) = re.findall(r"^semantic_ep:num_requests_running\{.*\} (.*)$", told, re.M)
        return float(running) == count

    clients = [threading.Thread(target=ask) for _ in range(count)]
    for client in clients:
        client.start()
    wait_until(all_running, said=server.log.read_text)
    yield answers
    for client in clients:
        client.join(120)


def kill_a_rank_under_load(server):
    """Kill rank 1 while requests are under way; returns what their clients were told."""
    with clients_being_served(server, 4) as answers:
        server.rank(1).kill()
    return [(answer.status_code, answer.json()["error"]["message"]) for answer in answers]


def test_the_group_is_started_again_after_a_lost_rank_and_drains_at_sigterm(launched):
    command = (sys.executable, "-m", "semantic_ep.cli", "serve", "--num-ranks", "2", "--restart")
    server = launched(*command)
    assert server.process.poll() is None
    told = kill_a_rank_under_load(server)
    assert [status for status, _ in told] == [503] * 4
    assert all("died or stopped answering" in message for _, message in told)
    wait_until(lambda: not is_ready(server.url))
    server.wait_until_ready()
    assert httpx.post(f"{server.url}/v1/completions", json=SLOW, timeout=120).status_code == 200

    with clients_being_served(server, 1) as late:
        server.process.send_signal(signal.SIGTERM)
    assert late[0].status_code == 200
    assert server.process.wait(60) == 0


def test_the_deepspeed_launcher_exits_with_an_error_when_a_rank_is_lost(launched):
    deepspeed = (sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2")
    port = ("--master_port", str(free_port()))
    config = ("--deepspeed_config", "configs/debug/cpu_2rank.json")
    server = launched(*deepspeed, *port, "launch/serve.py", *config)
    told = kill_a_rank_under_load(server)
    start = time.monotonic()
    assert [status for status, _ in told] == [503] * 4
    assert server.process.wait(60) != 0
    assert time.monotonic() - start < 60
    assert not is_ready(server.url)
