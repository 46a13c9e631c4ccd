# SPDX-License-Identifier: Apache-2.0
"""`sluice ztunnel`: the embedded layer 4 proxy."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields, replace

from agent.ztunnel.app import main
from agent.ztunnel.ztunnel_settings import (
    MESH_ADDRESSES,
    REVOCATION_FAILURES,
    ZtunnelSettings,
    check,
    from_environment,
    worker_count,
)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    defaults = ZtunnelSettings()
    parser = subparsers.add_parser("ztunnel", help="run the embedded ztunnel until it is stopped")
    parser.add_argument(
        "--zds-socket", metavar="PATH", help=f"the agent's ZDS socket (default: {defaults.zds_socket})"
    )  # fmt: skip
    parser.add_argument(
        "--records", metavar="PATH",
        help="file for one JSON line per connection; - is standard output, empty for none"
        f" (default: {defaults.records})",
    )  # fmt: skip
    parser.add_argument(
        "--access-log", metavar="PATH",
        help="file for one line per connection as Istio's ztunnel writes it, in JSON if LOG_FORMAT=json; - is standard"
        " output, empty for none (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--drain-seconds", type=float, metavar="S",
        help=f"how long connections may run on after SIGTERM (default: {defaults.drain_seconds})",
    )  # fmt: skip
    parser.add_argument(
        "--bpf-dir", metavar="PATH",
        help="the agent's bpf_dir: which resolver a query was for, in pods redirected by eBPF"
        f" (default: {defaults.bpf_dir})",
    )  # fmt: skip
    parser.add_argument(
        "--ready-file", metavar="PATH",
        help="file to create when the agent has handed over all pods; empty for none",
    )  # fmt: skip
    parser.add_argument(
        "--workers", metavar="N", type=_workers,
        help="processes that serve the pods; auto: a quarter of the cores, at least 2; 1: this process serves them"
        f" itself (default: {defaults.workers})",
    )  # fmt: skip
    pages = (
        ("--stats-address", "metrics (/metrics, /stats/prometheus)"),
        ("--ready-address", "readiness (/healthz/ready)"),
        ("--admin-address", "/config_dump, /logging and /quitquitquit"),
    )
    for (option, page), default in zip(pages, MESH_ADDRESSES, strict=True):
        parser.add_argument(
            option, metavar="HOST:PORT",
            help=f"where to serve {page}; empty for none (default: {default} with a mesh, otherwise none)",
        )  # fmt: skip
    parser.add_argument(
        "--mesh", metavar="SOURCE",
        help="workloads, services and policies: a file in the format of Istio's LOCAL_XDS_PATH, or https://HOST:PORT of"
        " istiod; without one every connection goes on in plain",
    )  # fmt: skip
    parser.add_argument(
        "--identities", metavar="SOURCE",
        help="certificates: development:DIRECTORY, files:DIRECTORY, istio:URL or spiffe:URL",
    )  # fmt: skip
    parser.add_argument(
        "--gateway", metavar="NAMESPACE/POD/SERVICE-ACCOUNT",
        help="serve as the east-west gateway that is this workload of the mesh, in a network namespace of its own;"
        " no agent is needed",
    )  # fmt: skip
    parser.add_argument(
        "--gateway-address", metavar="HOST:PORT", help=f"where a gateway listens (default: {defaults.gateway_address})"
    )  # fmt: skip
    parser.add_argument(
        "--revocation-lists", metavar="PATH",
        help="file or directory of certificate revocation lists; changes count without a restart (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--revocation-failure", choices=REVOCATION_FAILURES,
        help="whether a peer is served or refused if no current list of its issuer can be read"
        f" (default: {defaults.revocation_failure})",
    )  # fmt: skip
    parser.add_argument("--network", metavar="NAME", help="the network of this node (default: none)")
    parser.add_argument(
        "--trust-domain", metavar="NAME",
        help=f"of pods that the mesh does not know yet (default: {defaults.trust_domain})",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _workers(text: str) -> int:
    return worker_count(text, _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _run(args: argparse.Namespace) -> int:
    settings, unknown = from_environment(os.environ, _cores())
    given = {field.name: getattr(args, field.name, None) for field in fields(ZtunnelSettings)}
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    check(settings)
    if unknown:
        print(f"warning: not understood, and without effect: {', '.join(unknown)}", file=sys.stderr)
    if settings.gateway:
        from agent.ztunnel import gateway  # its modules need not be loaded by a node's ztunnel

        return gateway.main(settings)
    return main(settings)
