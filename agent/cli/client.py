# SPDX-License-Identifier: Apache-2.0
"""Asks the agent of this node for the commands."""

from __future__ import annotations

import argparse
import os

from agent.core import names
from agent.core.errors import SluiceError
from agent.kernel.admin_socket import ask

__all__ = ["add_bpf_dir", "add_option", "add_pod", "ask", "pod"]


def add_bpf_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bpf-dir",
        metavar="PATH",
        default=os.environ.get("SLUICE_BPF_DIR", names.BPF_DIR),
        help="what backend ebpf keeps in the kernel (default: $SLUICE_BPF_DIR or %(default)s)",
    )


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-dir",
        metavar="PATH",
        default=os.environ.get("SLUICE_RUN_DIR", names.RUN_DIR),
        help="the agent's directory (default: $SLUICE_RUN_DIR or %(default)s)",
    )


def add_pod(parser: argparse.ArgumentParser) -> None:
    """Adds POD, and -n for kubectl's users; see `pod`."""
    parser.add_argument("pod", metavar="POD", help="namespace/name, a unique name, or a UID")
    parser.add_argument("-n", "--namespace", metavar="NAMESPACE", default="", help="of a POD that is a name alone")


def pod(args: argparse.Namespace) -> str:
    """Returns the pod's name as the agent expects it. Raises SluiceError for two namespaces."""
    name, namespace = args.pod, args.namespace
    if namespace and "/" in name and name.partition("/")[0] != namespace:
        raise SluiceError(f"{name}: not of namespace {namespace}; give the namespace once")
    return f"{namespace}/{name}" if namespace and "/" not in name else str(name)
