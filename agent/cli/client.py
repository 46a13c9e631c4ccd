"""How commands reach the agent of this node."""

from __future__ import annotations

import argparse
import os

from agent.core import names
from agent.kernel.adminsocket import ask

__all__ = ["add_bpf_dir", "add_option", "ask"]


def add_bpf_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bpf-dir",
        default=os.environ.get("SLUICE_BPF_DIR", names.BPF_DIR),
        help="what backend ebpf keeps in the kernel (default: $SLUICE_BPF_DIR or %(default)s)",
    )


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-dir",
        default=os.environ.get("SLUICE_RUN_DIR", names.RUN_DIR),
        help="the agent's directory (default: $SLUICE_RUN_DIR or %(default)s)",
    )
