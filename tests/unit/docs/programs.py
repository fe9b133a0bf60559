"""What a documented command may be, and how far it is tried.

Every program that the documentation names has one function here. It runs the command in a sandbox,
or, where that would take minutes, GPUs or a network, has the program's own parser read it and looks
for the files that it names. A program without a function is an error, of the documentation or of
this table: nothing is passed over.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from semantic_ep.config import add_arguments
from semantic_ep.serve.arguments import parse_server_arguments
from tests.launch_scripts import load_script
from tests.unit.docs.pages import ROOT, Command

# Stands for a value of the reader's: M, PLAN, DIR, FILE.json, MODEL/config.json, main~5, ...
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*(\.\w+|/[\w.]+)?|\.\.\.|…")
# What a placeholder after a flag is tried with; RUN is a run directory that the sandbox has.
RUN = "runs/quickstart"
VALUES = {
    **{"--model": f"{RUN}/model", "--checkpoint": f"{RUN}/model", "--plan": f"{RUN}/plan"},
    **{"--profile": f"{RUN}/profile", "--holdout": f"{RUN}/holdout", "--from": "npz"},
    **{"--prompts": f"{RUN}/data/prompts.jsonl", "--router-groups": f"{RUN}/model/config.json"},
    **{"--config": f"{RUN}/model/config.json", "--embeddings": f"{RUN}/model", "--to": "sglang"},
    **{"--world-size": "16", "--expert-parallel": "4", "--nodes": "2", "--ep-size": "4"},
}
# Verbs of `semantic-ep` that need what no sandbox has, a Megatron checkpoint, or that do not end.
ONLY_PARSED = ("convert", "serve")
# Flags of Megatron-LM's own scripts, which are not installed.
UPSTREAM = ("--dist-ckpt-optim-fully-reshardable",)
# Launchers of several processes: what they start is parsed by its own parser.
SCRIPTS = ("serve", "finetune_deepspeed", "record", "corpus", "quickstart")


class RefusedError(Exception):
    """The documentation is wrong: a program would not take this command."""


@contextlib.contextmanager
def _quiet_parser(command: Sequence[str]) -> Iterator[None]:
    """Turn what argparse does with a wrong command line into a `RefusedError`."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            yield
    except SystemExit as stopped:
        if stopped.code not in (0, None):
            raise RefusedError(f"{' '.join(command)}\n{said.getvalue()}") from stopped


def filled(words: Sequence[str], new: Path) -> list[str]:
    """Words with values in the place of placeholders; outputs go below `new`."""
    done: list[str] = []
    for word in words:
        flag = done[-1] if done else ""
        if not PLACEHOLDER.fullmatch(word):
            done.append(word)
        elif flag in VALUES:
            done.append(VALUES[flag])
        else:
            done.append(str(new / word.replace("…", "x").replace("...", "x")))
    return done


def semantic_ep(words: Sequence[str], sandbox: Path) -> str:
    """Run a verb, in this process; a plan that is not worth it is an answer too."""
    from semantic_ep import cli

    new = sandbox / "new"
    arguments = filled(words[1:], new)
    if arguments[0] == "import" and str(new / "FILE") in arguments:
        arguments[arguments.index(str(new / "FILE"))] = "trace.npz"
    if arguments[0] in ONLY_PARSED:
        with _quiet_parser(words):
            cli._parser(only=arguments[0]).parse_args(arguments)
        return "parsed"
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = cli.main(arguments)
        except SystemExit as stopped:
            code = stopped.code or 0
    if code not in (cli.EXIT_OK, cli.EXIT_NO):
        raise RefusedError(f"{' '.join(arguments)}\n{said.getvalue()}")
    return "ran"


def script(name: str, arguments: Sequence[str]) -> str:
    """Have a script of launch/ parse its arguments."""
    arguments = filled(arguments, Path("new"))
    with _quiet_parser([name, *arguments]):
        if name == "finetune_megatron":
            load_script("megatron_arguments").parse_arguments("", arguments)
        elif name in SCRIPTS:
            load_script(name).parse_arguments(arguments)
        else:
            raise RefusedError(f"launch/{name}.py: no parser is known for it")
    return "parsed"


def python(words: Sequence[str], sandbox: Path) -> str:
    """A module's parser, or a script's; `launch/record.py` runs."""
    if words[1] == "-m":
        module, arguments = words[2], list(words[3:])
        if module == "benchmarks.run":
            run = importlib.import_module("benchmarks.run")
            theme = next((word for word in arguments if not word.startswith("-")), None)
            if theme == "THEME":
                arguments[arguments.index(theme)] = theme = "observe"
            with _quiet_parser(words):
                run._parser(theme).parse_args([word for word in arguments if word != "..."])
            return "parsed"
        if module == "pytest":
            return _files(arguments)
        return _source_has_flags(ROOT / f"{module.replace('.', '/')}.py", arguments)
    path = Path(words[1])
    if not (ROOT / path).is_file():
        raise RefusedError(f"{path} does not exist")
    if path == Path("launch/record.py"):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            if load_script("record").main(filled(words[2:], sandbox / "new")) != 0:
                raise RefusedError(f"{' '.join(words)}\n{said.getvalue()}")
        return "ran"
    if path.parent == Path("launch"):
        return script(path.stem, words[2:])
    return _source_has_flags(ROOT / path, words[2:])


def _source_has_flags(path: Path, words: Sequence[str]) -> str:
    """For a script whose parser cannot be had without running it."""
    if not path.is_file():
        raise RefusedError(f"{path.relative_to(ROOT)} does not exist")
    source = path.read_text()
    unknown = [word for word in words if word.startswith("-") and f'"{word}"' not in source]
    if unknown:
        raise RefusedError(f"{path.relative_to(ROOT)} has no {', '.join(unknown)}")
    return "parsed"


def deepspeed(words: Sequence[str], sandbox: Path) -> str:
    """The launcher's parser, then that of what it starts."""
    from deepspeed.launcher.runner import parse_args

    with _quiet_parser(words):
        launched = parse_args(list(words[1:]))
    return _started(launched.user_script, launched.user_args)


def torchrun(words: Sequence[str], sandbox: Path) -> str:
    """The launcher's parser, then that of what it starts."""
    from torch.distributed.run import get_args_parser

    arguments = list(words[1:])
    if arguments in (["…"], ["..."]):
        return "parsed"
    with _quiet_parser(words):
        launched = get_args_parser().parse_args(arguments)
    return _started(launched.training_script, launched.training_script_args)


def _started(target: str, arguments: Sequence[str]) -> str:
    if target == "semantic_ep.serve.http":
        with _quiet_parser(["semantic_ep.serve.http", *arguments]):
            parse_server_arguments(filled(arguments, Path("new")))
        return "parsed"
    if target == "train.py":  # The reader's own script: its flags are not ours.
        return "parsed"
    if not (ROOT / target).is_file():
        raise RefusedError(f"{target} does not exist")
    if "..." in arguments:
        return flags([word for word in arguments if word != "..."], Path(target).stem)
    # In a sentence a script may stand without its arguments.
    return script(Path(target).stem, arguments) if arguments else "parsed"


def bash(words: Sequence[str], sandbox: Path) -> str:
    """A script of the repository, and its arguments."""
    path = ROOT / words[1]
    if not path.is_file():
        raise RefusedError(f"{words[1]} does not exist")
    subprocess.run(["bash", "-n", path], check=True, timeout=20)
    if path.stem == "quickstart":
        return script("quickstart", words[2:])
    return _files(words[2:]) if path.stem == "test" else "parsed"


def pip(words: Sequence[str], sandbox: Path) -> str:
    """Extras of this package exist; other packages are the reader's."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    known = {"all", "dev"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS":
            known |= set(ast.literal_eval(node.value))
    for word in words:
        for extras in re.findall(r"^(?:semantic_ep|\.|-e)?\[([\w,]+)\]$", word):
            if unknown := set(extras.split(",")) - known:
                raise RefusedError(f"setup.py has no extra {', '.join(sorted(unknown))}")
    return "parsed"


def curl(words: Sequence[str], sandbox: Path) -> str:
    """The route exists, and its schema takes the body."""
    from semantic_ep.serve.http import schemas

    path = words[1].partition("/")[2]
    routes = "".join(file.read_text() for file in (ROOT / "semantic_ep/serve/http").glob("*.py"))
    if f'"/{path}"' not in routes:
        raise RefusedError(f"the server has no route /{path}")
    if "-d" in words and path.startswith("v1/"):
        chat = path.startswith("v1/chat")
        schema = schemas.ChatCompletionRequest if chat else schemas.CompletionRequest
        schema.model_validate(json.loads(words[words.index("-d") + 1]))
    return "parsed"


def locust(words: Sequence[str], sandbox: Path) -> str:
    """The file of tasks exists."""
    return _files(words[words.index("-f") + 1 :][:1])


def shell(words: Sequence[str], sandbox: Path) -> str:
    """Files of a run move, variables are set."""
    if words[0] in ("cp", "mv", "ln"):
        subprocess.run(words, cwd=sandbox, check=True, capture_output=True, timeout=20)
        return "ran"
    variables(words[1:])
    return "parsed"


def environment(words: Sequence[str], sandbox: Path) -> str:
    """What launch/env.sh and the repository set up."""
    known = {"source": "launch/env.sh", "pre-commit": ".pre-commit-config.yaml"}
    if not (ROOT / known[words[0]]).is_file():
        raise RefusedError(f"{known[words[0]]} does not exist")
    return "parsed"


def variables(assignments: Sequence[str]) -> None:
    """Variables of this project exist."""
    settings = (ROOT / "configs/README.md").read_text()
    for assignment in assignments:
        name = assignment.partition("=")[0]
        if name.startswith("SEMANTIC_EP_") and f"`{name}`" not in settings:
            raise RefusedError(f"there is no variable {name}")


def flags(words: Sequence[str], name: str = "finetune_megatron") -> str:
    """Flags by themselves, to add to a script's."""
    megatron = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(megatron)
    known = {*megatron._option_string_actions, *UPSTREAM}
    file = "megatron_arguments" if name == "finetune_megatron" else name
    known |= set(re.findall(r'"(--[\w-]+)"', (ROOT / f"launch/{file}.py").read_text()))
    if unknown := [word for word in words if word.startswith("--") and word not in known]:
        raise RefusedError(f"{name} has no {', '.join(unknown)}")
    return "parsed"


def _files(words: Sequence[str]) -> str:
    for word in words:
        path = word.partition("::")[0]
        if not word.startswith("-") and "/" in path and not (ROOT / path).exists():
            raise RefusedError(f"{path} does not exist")
    return "parsed"


PROGRAMS = {
    "semantic-ep": semantic_ep,
    "python": python,
    "deepspeed": deepspeed,
    "torchrun": torchrun,
    "bash": bash,
    "pip": pip,
    "curl": curl,
    "locust": locust,
    **dict.fromkeys(("cp", "mv", "ln", "export"), shell),
    **dict.fromkeys(("source", "pre-commit"), environment),
}


def attempt(command: Command, sandbox: Path) -> str:
    """Run or parse one command; returns "ran" or "parsed".

    Raises:
        RefusedError: It would not work, or no function knows its program.
    """
    variables(command.variables)
    if not command.words:
        return "parsed"
    if all(word.startswith("--") for word in command.words[:1]):
        return flags(command.words)
    if command.words[0] not in PROGRAMS:
        raise RefusedError(f"no rule for the program {command.words[0]}: {' '.join(command.words)}")
    for word in command.words:
        path = word.removeprefix("@")
        if re.match(r"(configs|launch|docs|tests)/", path) and not (ROOT / path).exists():
            raise RefusedError(f"{path} does not exist")
    return PROGRAMS[command.words[0]](command.words, sandbox)
