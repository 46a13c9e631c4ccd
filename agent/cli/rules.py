"""`sluice rules render`: the rules of a variant, without an agent and without touching anything."""

from __future__ import annotations

import argparse
from typing import Any

from agent.backends.iptables import rendering as xtables
from agent.backends.nftables import rendering as nftables
from agent.backends.routing import RoutingBackend
from agent.cli import output
from agent.core.redirect import Redirect


def register(subparsers: Any) -> None:
    group = subparsers.add_parser("rules", help="the rules themselves")
    commands = group.add_subparsers(dest="rules_command", metavar="COMMAND", required=True)
    parser = commands.add_parser("render", help="print the rules of a variant as the backend's own script")
    parser.add_argument("--backend", choices=("nftables", "iptables"), required=True)
    parser.add_argument("--no-ipv6", action="store_true", help="a pod without IPv6")
    parser.add_argument("--no-dns", action="store_true", help="without DNS capture")
    parser.add_argument("--ingress-only", action="store_true", help="inbound traffic is not captured")
    parser.add_argument("--virtual-interface", action="append", default=[], metavar="NAME")
    output.add_option(parser)
    parser.set_defaults(run=_render)


def _render(args: argparse.Namespace) -> int:
    redirect = Redirect(
        ipv6=not args.no_ipv6,
        dns=not args.no_dns,
        ingress_only=args.ingress_only,
        virtual_interfaces=tuple(args.virtual_interface),
    )
    scripts = render(args.backend, redirect)
    output.emit(args.output, scripts, "\n".join(f"# {name}\n{text}" for name, text in scripts.items()))
    return 0


def render(backend: str, redirect: Redirect) -> dict[str, str]:
    """Program that reads it -> script."""
    scripts = {"ip": str(RoutingBackend().plan(redirect, []))}
    if backend == "nftables":
        return {**scripts, "nft -f": nftables.render(redirect, owned=False).text}
    for family, program in ((4, "iptables-nft-restore --noflush"), (6, "ip6tables-nft-restore --noflush")):
        text = xtables.script(family, xtables.render(redirect, family), {})
        if text:
            scripts[program] = text.rstrip()
    return scripts
