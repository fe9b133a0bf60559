"""Lets `python -m semantic_ep.cli` stand for `semantic-ep`."""

import sys

from semantic_ep.cli import main

if __name__ == "__main__":
    sys.exit(main())
