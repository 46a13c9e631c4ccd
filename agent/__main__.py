# SPDX-License-Identifier: Apache-2.0
"""The program `sluice`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from agent import __version__
from agent.cli.parsing import Parser, ProgramParser
from agent.core.errors import SluiceError
from agent.core.text import printable

_ABOUT = "Takes the traffic of pods through one layer 4 proxy per node, keeps it right, and can say why."


# Command -> module of agent.cli that has it. The daemon pays for what it imports, so only the command's is.
_GROUPS = {
    "agent": "agent",
    "ztunnel": "ztunnel",
    "lab": "lab",
    "status": "node_status",
    "pods": "node_status",
    "explain": "explain",
    "connections": "connections",
    "dns": "dns",
    "events": "events",
    "verify": "verify",
    "diff": "verify",
    "rules": "rules",
    "preflight": "preflight",
    "uncapture": "uncapture",
    "handback": "handback",
    "install": "install",
    "uninstall": "install",
    "migrate": "migrate",
    "help": "completion",
    "version": "completion",
    "completion": "completion",
    "doctor": "doctor",
    "report": "doctor",
}


_DAEMONS = ("agent", "ztunnel")

# The order of commands in the help; those without a section come last.
_SECTIONS = (
    (
        "What holds on this node (asks the agent)",
        ("status", "pods", "explain", "connections", "dns", "events", "verify", "diff"),
    ),
    ("What is wrong with it", ("doctor", "report", "preflight")),
    ("Change it (needs no agent)", ("install", "uninstall", "uncapture", "handback", "migrate")),
    ("Run", ("agent", "ztunnel")),
    ("Try", ("lab", "rules")),
    ("About", ("help", "version", "completion")),
)


def parser(command: str = "") -> argparse.ArgumentParser:
    """Returns the parser of one command's group, or of all of them."""
    top = ProgramParser(_SECTIONS, _ABOUT, prog="sluice")
    top.add_argument("--version", action="version", version=f"sluice {__version__}")
    top.set_defaults(version_text=__version__, whole=parser)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    modules = [_GROUPS[command]] if command in _GROUPS else dict.fromkeys(_GROUPS.values())
    for module in modules:
        import_module(f"agent.cli.{module}").register(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors are one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"] and not any(word.startswith("-") for word in arguments):
        arguments = [*arguments[1:], "--help"]
    if arguments[:2] == ["proxy", "ztunnel"]:  # what Istio's chart gives its image
        arguments = arguments[1:]
    try:
        args = parser(arguments[0] if arguments else "").parse_args(arguments)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except SluiceError as error:
        print(f"sluice: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the rest has no reader, also when the interpreter ends
        return 0
    except OSError as error:
        if arguments[0] in _DAEMONS:  # of a defect their logs have to have all
            raise
        file = f"{error.filename}: " if error.filename else ""
        print(f"sluice: {arguments[0]}: {file}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
