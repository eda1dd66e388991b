"""Arguments that several commands share."""

from __future__ import annotations

import argparse


def add_pickle(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that lets weights be loaded which run code while they are."""
    parser.add_argument(
        "--pickle", action="store_true", help="load weights that are no safetensors; doing so runs code that is in them"
    )
