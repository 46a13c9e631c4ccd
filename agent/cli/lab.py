# SPDX-License-Identifier: Apache-2.0
"""`sluice lab up|down|exec|pods`: nodes and pods in network namespaces of this machine, for experiments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from agent.core.errors import SluiceError
from agent.core.text import table
from agent.kernel.exec import start
from agent.lab.demo import demo
from agent.lab.lab import Lab, check_machine, down
from agent.lab.lab_spec import DEFAULT_PREFIX, DOMAIN, default_spec
from agent.lab.node_services import LabBackend


def register(subparsers: Any) -> None:
    """Adds the group to argparse's `subparsers`; each command sets `run`, which returns the exit code."""
    group = subparsers.add_parser("lab", help="nodes and pods in network namespaces of this machine")
    commands = group.add_subparsers(dest="lab_command", metavar="COMMAND", required=True)
    parser = _command(commands, "demo", _demo, "show and prove the main job with real traffic; leaves nothing behind")
    demos = [str(b) for b in (LabBackend.NFTABLES, LabBackend.EBPF)]
    parser.add_argument(
        "--backend", choices=demos, default=demos[0], help="backend at the start (default: %(default)s)"
    )
    parser = _command(commands, "up", _up, "build the lab and leave it running")
    parser.add_argument(
        "--backend",
        choices=[str(b) for b in LabBackend],
        default=str(LabBackend.NFTABLES),
        help="backend of the agents (default: %(default)s)",
    )
    parser.add_argument(
        "--without-sluice", action="store_true", help="plain pods: neither agent nor ztunnel nor sluice-cni"
    )
    parser.add_argument("--ztunnel", type=Path, metavar="PATH", help="Istio's ztunnel, instead of the embedded one")
    parser.add_argument(
        "--without-mesh", action="store_true", help="the embedded ztunnels have no identities and speak no HBONE"
    )
    _command(commands, "down", _down, "remove the lab, also one that is half built")
    parser = _command(commands, "exec", _exec, "run a command in a pod: exec POD -- COMMAND ...")
    parser.add_argument("pod", metavar="POD", help="NAMESPACE/NAME, or NAME alone")
    parser.add_argument(
        "argv", metavar="COMMAND", nargs=argparse.REMAINDER, help="after --: the command and its arguments"
    )
    _command(commands, "pods", _pods, "list the lab's pods with their addresses")


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text)
    parser.add_argument(
        "--prefix", default=DEFAULT_PREFIX, help="prefix of the lab's names, one per lab (default: %(default)s)"
    )
    parser.set_defaults(run=run)
    return parser


def _up(args: argparse.Namespace) -> int:
    sluice = not args.without_sluice
    mesh = sluice and args.ztunnel is None and not args.without_mesh
    lab = Lab(default_spec(args.prefix), args.ztunnel, mesh=mesh)
    lab.up(agents=sluice, sluice=sluice, backend=LabBackend(args.backend), progress=_progress)
    _pods(args)
    _progress(f"up; the resolver {lab.resolver} knows the names in {DOMAIN}")
    if mesh:
        _progress(f"connections between enrolled pods go by HBONE: {_wire(lab)}")
    prefix = "" if args.prefix == DEFAULT_PREFIX else f" --prefix {args.prefix}"
    _progress(
        f"to run a command in a pod: sluice lab exec{prefix} shop/client -- COMMAND;"
        f" to remove the lab: sluice lab down{prefix}"
    )
    return 0


def _wire(lab: Lab) -> str:
    return f"sluice connections --wire --run-dir {lab.spec.node_dir(lab.spec.nodes[0])}"


def _progress(step: str) -> None:
    print(f"lab: {step}", flush=True)


def _demo(args: argparse.Namespace) -> int:
    return demo(args.prefix, LabBackend(args.backend))


def _down(args: argparse.Namespace) -> int:
    check_machine()
    down(args.prefix)
    return 0


def _exec(args: argparse.Namespace) -> int:
    check_machine()
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not argv:
        raise SluiceError("lab exec: no command; write: sluice lab exec POD -- COMMAND ...")
    netns = Lab.from_state(args.prefix).netns(args.pod)
    process = start(argv, netns=netns, stdin=0, stdout=1, stderr=2)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # It has a session of its own, so the terminal's Ctrl-C came to us alone.
        process.terminate()
        code = process.wait()
    return code if code >= 0 else 128 - code


def _pods(args: argparse.Namespace) -> int:
    rows = [
        (
            pod.spec.ref,
            pod.spec.node,
            "yes" if pod.spec.enrolled else "no",
            pod.ipv4,
            pod.ipv6,
            ",".join(pod.spec.programs),
        )
        for pod in Lab.from_state(args.prefix).pods.up().values()
    ]
    print(table(("POD", "NODE", "ENROLLED", "IPV4", "IPV6", "PROGRAMS"), rows))
    return 0
