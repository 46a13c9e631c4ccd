"""The program `sluice`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from agent import __version__
from agent.core.errors import SluiceError

_ABOUT = """Takes the traffic of pods through one layer 4 proxy per node, keeps it right, and can say why.
Exit codes: 0 fine, 1 drift or a failed check, 2 the command could not do its work."""


# Command -> module of agent.cli that has it. The daemon pays for what it imports, so only the command's is.
_GROUPS = {
    "agent": "agent",
    "ztunnel": "ztunnel",
    "lab": "lab",
    "status": "pods",
    "pods": "pods",
    "explain": "pods",
    "connections": "connections",
    "verify": "verify",
    "diff": "verify",
    "rules": "rules",
    "preflight": "preflight",
    "uncapture": "uncapture",
    "handback": "handback",
    "install": "install",
    "uninstall": "uninstall",
    "migrate": "migrate",
}


def parser(command: str = "") -> argparse.ArgumentParser:
    """With the group of one command, or with all of them."""
    top = argparse.ArgumentParser(prog="sluice", description=_ABOUT)
    top.add_argument("--version", action="version", version=f"sluice {__version__}")
    top.set_defaults(version_text=__version__)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = [_GROUPS[command]] if command in _GROUPS else dict.fromkeys(_GROUPS.values())
    for module in modules:
        import_module(f"agent.cli.{module}").register(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors are one line on stderr and exit code 2."""
    words = sys.argv[1:] if argv is None else argv
    args = parser(words[0] if words else "").parse_args(words)
    try:
        code: int = args.run(args)
        return code
    except SluiceError as error:
        print(f"sluice: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
