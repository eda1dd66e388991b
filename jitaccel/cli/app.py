"""Open the app in a browser: prompts, presets to compare, reports."""

from __future__ import annotations

import argparse
import importlib.util

from ..errors import CommandError
from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    options.add_model_options(parser, offload=True)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, help="port to listen on; if omitted, the first free one from 7860")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")


def run(arguments: argparse.Namespace) -> int:
    """Serves the app until it is stopped."""
    if importlib.util.find_spec("gradio") is None:
        raise CommandError('Gradio must be installed for the app, got none; pip install "jitaccel[app]"')
    if arguments.port is not None and not 0 < arguments.port < 65536:
        raise CommandError(f"--port must be in 1..65535, got {arguments.port}")
    from ..app.page import build
    from ..app.studio import Studio

    page = build(Studio(options.load(arguments), arguments.model, arguments.offload))
    page.launch(server_name=arguments.host, server_port=arguments.port, inbrowser=not arguments.no_browser)
    return 0
