"""The program `sluice`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from agent.cli import agent, lab, pods, rules, verify, ztunnel
from agent.core.errors import SluiceError

_ABOUT = """Takes the traffic of pods through one layer 4 proxy per node, keeps it right, and can say why.
Exit codes: 0 fine, 1 drift or a failed check, 2 the command could not do its work."""


def parser() -> argparse.ArgumentParser:
    try:
        number = version("sluice")
    except PackageNotFoundError:
        number = "unknown"
    top = argparse.ArgumentParser(prog="sluice", description=_ABOUT)
    top.add_argument("--version", action="version", version=f"sluice {number}")
    top.set_defaults(version_text=number)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for group in (agent, ztunnel, lab, pods, verify, rules):
        group.register(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors are one line on stderr and exit code 2."""
    args = parser().parse_args(argv)
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
