"""`semantic-ep serve`: what it starts, and what it does when that ends."""

import json
import signal
import subprocess
import sys

import pytest

from semantic_ep import cli
from semantic_ep.cli import serve

CRASHES = "import os; os._exit(3)"
WAITS = (
    "import signal, time; signal.signal(15, lambda *_: exit(0)); print(flush=True); time.sleep(60)"
)


def supervisor(monkeypatch, code):
    monkeypatch.setattr(serve, "command", lambda *_: [sys.executable, "-c", code])
    return serve.Supervisor(1, [])


def test_one_rank_needs_no_launcher_and_several_are_started_by_deepspeeds():
    assert serve.command(1, ["--model", "m"], 1)[1:] == ["-m", serve.MODULE, "--model", "m"]
    several = serve.command(4, ["--model", "m"], 77)
    assert several[2] == "deepspeed.launcher.runner"
    assert several[-4:] == ["--module", serve.MODULE, "--model", "m"]
    assert several[5:9] == ["--num_gpus", "4", "--master_port", "77"]


def test_ranks_get_every_flag_but_those_of_the_command():
    words = ["-v", "serve", "--model", "m", "--num-ranks", "2", "--restart", "--port", "1"]
    assert serve._of_the_server(words) == ["--model", "m", "--port", "1"]
    shortened = ["serve", "--model", "m", "--num-r=2", "--rest", "--po", "1"]
    assert serve._of_the_server(shortened) == ["--model", "m", "--po", "1"]


def test_without_restart_the_exit_code_is_that_of_the_ranks(monkeypatch):
    assert supervisor(monkeypatch, CRASHES).run(restart=False) == 3
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert supervisor(monkeypatch, killed).run(restart=False) == 128 + signal.SIGKILL


def test_ranks_that_end_early_again_and_again_are_given_up(monkeypatch, tmp_path):
    log = tmp_path / "starts"
    code = f"open({str(log)!r}, 'a').write('x'); {CRASHES}"
    assert supervisor(monkeypatch, code).run(restart=True) == 3
    assert log.read_text() == "xxx"


def test_a_signal_is_passed_on_and_ends_restarts(monkeypatch):
    watched = supervisor(monkeypatch, WAITS)
    started = subprocess.Popen

    def start(command, **options):
        process = started(command, stdout=subprocess.PIPE, **options)
        process.stdout.readline()  # it can be signalled now
        watched._child = process
        watched.stop(signal.SIGTERM, None)
        return process

    monkeypatch.setattr(serve.subprocess, "Popen", start)
    assert watched.run(restart=True) == 0
    assert watched._child.returncode == 0


@pytest.mark.parametrize(
    ("section", "flags", "ranks"),
    [
        ({}, [], 1),
        ({"groups": {"ep_size": 4}}, [], 4),
        ({"groups": {"ep_size": 4}}, ["--num-ranks", "2"], 2),
    ],
)
def test_the_number_of_ranks_is_asked_for_or_found_in_the_settings(tmp_path, section, flags, ranks):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"semantic_ep": section}))
    words = ["serve", "--model", "m", "--deepspeed_config", str(config), *flags]
    assert serve._num_ranks(cli._parser(only="serve").parse_args(words)) == ranks


def test_a_configuration_that_cannot_be_read_is_an_error_before_anything_starts(capsys):
    words = ["serve", "--model", "m", "--deepspeed_config", "/nowhere.json"]
    assert cli.main(words) == cli.EXIT_ERROR
    assert "cannot read this file" in capsys.readouterr().err
