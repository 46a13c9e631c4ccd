# SPDX-License-Identifier: Apache-2.0
"""`sluice rules render`: prints the rules of a variant, without an agent and without changing anything."""

from __future__ import annotations

import argparse
import ipaddress
from typing import Any

from agent.backends.choose import LAYERS
from agent.backends.ebpf import state
from agent.backends.iptables import rendering as xtables
from agent.backends.nftables import rendering as nftables
from agent.backends.routing import RoutingBackend, RoutingState
from agent.cli import options
from agent.core.errors import SettingsError
from agent.core.model.exclusions import exclusions
from agent.core.model.redirect import Redirect


def register(subparsers: Any) -> None:
    group = subparsers.add_parser("rules", help="print rules")
    commands = group.add_subparsers(dest="rules_command", metavar="COMMAND", required=True)
    parser = commands.add_parser("render", help="print the rules of a variant as the backend's own script")
    parser.add_argument(
        "--backend", choices=tuple(LAYERS), required=True, help="the backend that would apply the rules"
    )
    parser.add_argument("--no-ipv6", action="store_true", help="a pod without IPv6")
    parser.add_argument("--no-dns", action="store_true", help="without DNS capture")
    parser.add_argument("--ingress-only", action="store_true", help="inbound traffic is not captured")
    parser.add_argument(
        "--virtual-interface", action="append", default=[], metavar="NAME", help="an interface of a virtual machine"
    )
    parser.add_argument("--dns-to", default="", metavar="ADDRESSES", help="capture DNS towards these resolvers only")
    parser.add_argument("--refuse-non-tcp", action="store_true", help="drop what is neither TCP nor captured DNS")
    parser.add_argument("--preserve", action="store_true", help="while pre-existing connections live")
    parser.add_argument(
        "--annotation", action="append", default=[], metavar="KEY=VALUE", help="such as a pod's traffic.sluice.io/..."
    )
    options.finish(parser, _render, options.output)


def _render(args: argparse.Namespace) -> int:
    warnings: list[str] = []
    annotations = dict(_pair(word) for word in args.annotation)
    redirect = Redirect(
        ipv6=not args.no_ipv6,
        dns=not args.no_dns,
        ingress_only=args.ingress_only,
        virtual_interfaces=tuple(args.virtual_interface),
        dns_to=tuple(_address(word.strip()) for word in args.dns_to.split(",") if word.strip()),
        exclude=exclusions(annotations, sidecar=True, warnings=warnings),
        refuse_non_tcp=args.refuse_non_tcp,
        preserve=args.preserve,
    )
    if warnings:
        raise SettingsError("; ".join(warnings))
    scripts = render(args.backend, redirect)
    options.emit(args.output, scripts, "\n".join(f"# {name}\n{text}" for name, text in scripts.items()))
    return 0


def _pair(word: str) -> tuple[str, str]:
    key, sign, value = word.partition("=")
    if not sign:
        raise SettingsError(f"--annotation: {word!r} is not KEY=VALUE")
    return key, value


def _address(word: str) -> str:
    try:
        return str(ipaddress.ip_address(word))
    except ValueError:
        raise SettingsError(f"--dns-to: {word!r} is not an address") from None


def render(backend: str, redirect: Redirect) -> dict[str, str]:
    """Returns each program and the script that it reads."""
    if backend == "ebpf":
        # Entries of a pod without interfaces and addresses, which only the namespace has.
        return {"bpftool": str(state.plan(redirect, state.PodEntries(cookie=0)))}
    scripts = {"ip": str(RoutingBackend().plan(redirect, RoutingState()))}
    if backend == "nftables":
        return {**scripts, "nft -f": nftables.render(redirect, owned=False).text}
    variant = "legacy" if backend == "iptables-legacy" else "nft"
    for family, six in ((4, ""), (6, "6")):
        program = f"ip{six}tables-{variant}-restore --noflush"
        text = xtables.script(xtables.render(redirect, family), {})
        if text:
            scripts[program] = text.rstrip()
    return scripts
