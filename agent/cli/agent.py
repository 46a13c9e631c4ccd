# SPDX-License-Identifier: Apache-2.0
"""`sluice agent`: runs the node agent."""

from __future__ import annotations

import argparse
import gc
import os
from typing import Any

from agent.cli import settings_sources
from agent.core.errors import SluiceError
from agent.kernel import logs


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("agent", help="run the node agent")
    settings_sources.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    settings = settings_sources.load(args)
    if os.geteuid() != 0:
        raise SluiceError("sluice agent programs network namespaces; run it as root")
    logs.start(settings.log_level.upper(), "%(asctime)s %(levelname)s %(name)s: %(message)s")
    gc.disable()  # nothing of what is loaded now is ever garbage; app turns it on again
    from agent import app  # the daemon's parts are loaded for the daemon alone

    return app.main(settings, args.version_text, settings_sources.origins(args))
