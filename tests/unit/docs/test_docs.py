"""The documentation is true: its commands work, its links lead somewhere, its snippets fit."""

from __future__ import annotations

import ast
import importlib
import io
import json
import os
import re
import shutil
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from semantic_ep.config import SemanticEPConfig
from tests.unit.docs import programs
from tests.unit.docs.pages import PAGES, ROOT, Block, anchors, blocks, commands, links, spans

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
WORDS = 256
FRAMEWORKS = ("deepspeed", "megatron", "transformers")
# Pages that tell of one run from its beginning to its end have a directory of their own.
OWN_RUNS = ("runs/megatron", "runs/deepspeed")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What the quickstart leaves, tiny: a model with planted routing, made by the real classes."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("deepspeed")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from benchmarks.serve_inputs import planted_inputs
    from semantic_ep.cli import main

    run = tmp_path_factory.mktemp("finished") / "run"
    inputs = planted_inputs(run / "model", requests=4, seed=0)
    inputs.profile.save(run / "profile")
    inputs.holdout.save(run / "holdout")
    (run / "data").mkdir()
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(run / "model")
    tokenizer.save(str(run / "data" / "tokenizer.json"))
    # Words of one planted topic are 4 apart.
    texts = [" ".join(f"w{4 * i + topic}" for i in range(12)) for topic in range(4)] * 20
    rows = "".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts))
    for name in ("prompts", "holdout"):
        (run / "data" / f"{name}.jsonl").write_text(rows)
    shutil.copytree(run / "holdout", run / "later" / "profile-sample")
    words = ["plan", "--profile", str(run / "profile"), "--ep-size", "4", "-o", str(run / "plan")]
    with redirect_stdout(io.StringIO()):
        assert main(words) == 0
    return run


@pytest.fixture
def sandbox(finished, tmp_path, monkeypatch):
    """A checkout in which the quickstart has run, to be written into."""
    for name in ("launch", "configs", "benchmarks", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").mkdir()
    shutil.copytree(finished, tmp_path / programs.RUN)
    for name in OWN_RUNS:
        # Where the page's own commands write, nothing is yet.
        ignored = ("plan", "holdout") if name == "runs/megatron" else ("plan",)
        skip = shutil.ignore_patterns(*ignored)
        shutil.copytree(finished, tmp_path / name, ignore=skip)
    write_recordings(finished, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return tmp_path


def write_recordings(run, directory):
    """The recordings that pages name: of the run's model, and of one with 26 MoE layers."""
    from semantic_ep.observe.formats import write_npz_trace
    from semantic_ep.observe.traces import RoutingTrace

    trace = RoutingTrace.load(run / "holdout")
    write_npz_trace(trace, directory / "trace.npz")
    experts = np.repeat(trace.experts, 13, axis=1)
    np.savez(directory / "v2_lite.npz", experts=experts, offsets=trace.offsets)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_of_a_page_runs_or_is_what_its_program_takes(page, sandbox):
    done = Counter()
    for block in blocks(page):
        if block.language != "bash":
            continue
        for command in commands(block):
            try:
                done[programs.attempt(command, sandbox)] += 1
            except programs.RefusedError as refused:
                pytest.fail(f"{command.where}: {refused}")
    print(f"{page.name}: {dict(done)}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("semantic-ep plan --profil P --holdout T --ep-size 4 -o PLAN --polcy x", "--polcy"),
        ("semantic-ep simulate --plan runs/absent --trace T", "runs/absent"),
        ("python -m benchmarks.run scale --trace A.npz", "--trace"),
        ("deepspeed --num-gpu 4 launch/serve.py --model M --prompts FILE", "--num-gpu"),
        ("bash launch/quickstart.sh --slow", "--slow"),
        ("python launch/absent.py", "launch/absent.py"),
        ("pip install 'semantic_ep[serv]'", "serv"),
        ("SEMANTIC_EP_PLANS=x semantic-ep doctor", "SEMANTIC_EP_PLANS"),
        ("make everything", "make"),
    ],
)
def test_a_command_that_would_not_work_is_found(line, said, sandbox):
    block = Block(page=ROOT / "README.md", line=1, language="bash", text=line)
    (command,) = commands(block)
    with pytest.raises(programs.RefusedError, match=re.escape(said)):
        programs.attempt(command, sandbox)


def test_the_tutorial_for_other_engines_runs_from_end_to_end(sandbox):
    page = ROOT / "docs/tutorial-placement.md"
    tried = [
        (command.words[0], programs.attempt(command, sandbox))
        for block in blocks(page)
        if block.language == "bash"
        for command in commands(block)
    ]
    assert [program for program, how in tried if how == "parsed"] == ["bash"]
    placed = json.loads((sandbox / "runs/placement/sglang.json").read_text())
    assert sorted(placed["physical_to_logical_map"][0]) == list(range(8))
    original = sandbox / programs.RUN / "model/model.safetensors"
    restored = sandbox / "runs/placement/restored/model.safetensors"
    assert restored.read_bytes() == original.read_bytes()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_in_sentences_have_the_flags_that_they_name(page):
    for where, words in spans(page):
        if words[0] == "semantic-ep":
            source = help_of(words[1], *(words[2:3] if words[2:3] == ["groups"] else []))
        elif words[0] == "python" and words[1:3] == ["-m", "benchmarks.run"] and len(words) > 3:
            source = help_of_theme(words[3])
        else:
            files = [word for word in words if re.match(r"(launch|benchmarks|configs)/", word)]
            assert all((ROOT / file).exists() for file in files), f"{where}: {files}"
            continue
        flags = [word.partition("=")[0] for word in words if word.startswith("-")]
        absent = [flag for flag in flags if flag not in source]
        assert not absent, f"{where}: {' '.join(words)} has no {', '.join(absent)}"


def help_of(*words):
    from semantic_ep import cli

    assert words[0] in cli.VERBS, f"semantic-ep has no verb {words[0]}"
    with redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        cli.main([*words, "--help"])
    return said.getvalue()


def help_of_theme(theme):
    from benchmarks import run

    with redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as stopped:
        run._parser(theme).parse_args([theme, "--help"])
    assert stopped.value.code == 0, theme
    return said.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target in links(page):
        if re.match(r"(https?|mailto|data):", target):
            continue
        path, _, anchor = target.partition("#")
        file = Path(os.path.normpath(page.parent / path)) if path else page
        assert file.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading"


def test_the_index_names_every_page():
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}
    assert pages <= set(links(ROOT / "docs/README.md"))
    assert "docs/README.md" in links(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_settings_in_json_are_settings_that_exist(page):
    for block in blocks(page):
        if block.language == "json":
            text = block.text if block.text.lstrip().startswith("{") else f"{{{block.text}}}"
            document = json.loads(text)
            if "semantic_ep" in document:
                SemanticEPConfig.from_deepspeed(document)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_snippets_parse_and_import_what_exists(page):
    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("semantic_ep"):
                continue
            for framework in FRAMEWORKS:
                if framework in node.module:
                    pytest.importorskip(framework)
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block.where}: {node.module}.{alias.name}"
