"""The `semantic-ep` command: one module a verb, imported when the verb is used."""

from __future__ import annotations

import argparse
import importlib
import keyword
import logging
import sys
from collections.abc import Sequence

from semantic_ep import __version__
from semantic_ep.errors import SemanticEPError

VERBS = {
    "import": "read routing recorded by another tool, to plan on it",
    "plan": "choose where experts live and where tokens run, judged on held-out routing",
    "simulate": "count what a plan makes other routing cost, and whether it is out of date",
    "apply": "write a checkpoint permuted for engines that know no plan, or undo it",
    "export": "write a plan's placement in the file of another serving engine",
    "serve": "start an OpenAI-compatible server whose experts lie as a plan says",
    "convert": "turn Hugging Face checkpoints into Megatron ones or back, or DeepSpeed's universal",
    "report": "draw the report of a run from its measurements",
    "patches": "show the seams into upstream code, and check that they fit what is installed",
    "doctor": "show what is installed, what works here, and why the rest does not",
}

EXIT_OK, EXIT_NO, EXIT_ERROR = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 when it did what was asked, 1 when the answer is "no" (a plan that is not worth it, a
        failed check), 2 on an error, which is printed as one message.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in arguments if not word.startswith("-")), None)
    parser = _parser(only=verb if verb in VERBS else None)
    args = parser.parse_args(arguments)
    args.arguments = arguments
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        return int(args.run(args))
    except SemanticEPError as error:
        if args.verbose:
            raise
        print(f"semantic-ep {args.verb}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"semantic-ep {args.verb}: interrupted, nothing was written", file=sys.stderr)
        return EXIT_ERROR


def _parser(only: str | None) -> argparse.ArgumentParser:
    """Build the parser; arguments of a verb are added for that verb alone, to keep help fast."""
    parser = argparse.ArgumentParser(
        prog="semantic-ep",
        description="Semantic expert parallelism: put experts and the tokens that want them on "
        "the same rank.",
    )
    parser.add_argument("--version", action="version", version=f"semantic_ep {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="debug log and tracebacks")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        sub = verbs.add_parser(name, help=summary, description=summary, parents=[common])
        if name == only:
            module = importlib.import_module(_module_of(name))
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def _module_of(verb: str) -> str:
    """Name of a verb's module; one that is a word of Python's gets an underscore."""
    return f"semantic_ep.cli.{verb}{'_' if keyword.iskeyword(verb) else ''}"
