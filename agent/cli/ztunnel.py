# SPDX-License-Identifier: Apache-2.0
"""`sluice ztunnel`: the embedded layer 4 proxy."""

from __future__ import annotations

import argparse

from agent.ztunnel.app import ZtunnelSettings, main


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    defaults = ZtunnelSettings()
    parser = subparsers.add_parser("ztunnel", help="run the embedded ztunnel until it is stopped")
    parser.add_argument(
        "--zds-socket", default=defaults.zds_socket, metavar="PATH", help="the agent's ZDS socket"
    )  # fmt: skip
    parser.add_argument(
        "--records", default=defaults.records, metavar="PATH",
        help="file for one JSON line per connection; - is standard output, empty for none",
    )  # fmt: skip
    parser.add_argument(
        "--drain-seconds", type=float, default=defaults.drain_seconds, metavar="S",
        help="how long connections may run on after SIGTERM (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--bpf-dir", default=defaults.bpf_dir, metavar="PATH",
        help="the agent's bpf_dir: which resolver a query was for, in pods redirected by eBPF (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ready-file", default=defaults.ready_file, metavar="PATH",
        help="file to create when the agent has handed over all pods; empty for none",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    made = ZtunnelSettings(
        zds_socket=args.zds_socket,
        records=args.records,
        drain_seconds=args.drain_seconds,
        bpf_dir=args.bpf_dir,
        ready_file=args.ready_file,
    )
    return main(made)
