# SPDX-License-Identifier: Apache-2.0
"""A node in small: a namespace that plays the host, two pods and an outside client that it routes between."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from support.node import PORT, Server

from agent.backends.hostprobes.claims import Claims
from agent.backends.hostprobes.layers import HostLayer, layers
from agent.backends.hostprobes.nft_layer import NftHostProbes
from agent.backends.hostprobes.want import HostProbes
from agent.core.names import PROBE_IPV4, PROBE_IPV6
from agent.kernel.exec import run
from agent.kernel.host_netns import HostNetns
from agent.kernel.netns import Netns
from agent.lab.links import FORWARD, NO_DAD, Port, add_namespace, join, remove_namespace

PROBE = {4: PROBE_IPV4, 6: PROBE_IPV6}
NOBODY = 65534
_numbers = itertools.count()


def active(*, owned: bool = False) -> tuple[HostLayer, ...]:
    """Fresh layers. Owned tables cannot be damaged, so they are shown by themselves."""
    made, _ = layers("nftables")
    for layer in made:
        if isinstance(layer, NftHostProbes):
            layer.owned = owned
    return made


def want(claims: Claims, *, ipv6: bool = True, complete: bool = True) -> HostProbes:
    return claims.want(PROBE_IPV4, PROBE_IPV6, ipv6=ipv6, complete=complete)


class Place:
    """A namespace with `number` in its addresses; the host has none of its own but one on each link."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.path, self.number = name, Path("/run/netns", name), number
        add_namespace(name, {**NO_DAD, "net/ipv4/conf/all/rp_filter": 0, **(FORWARD if number == 0 else {})})

    def address(self, family: int) -> str:
        return f"10.82.{self.number}.2" if family == 4 else f"fd82:{self.number}::2"

    def host(self, family: int) -> str:
        """The host's address on this place's link."""
        return f"10.82.{self.number}.1" if family == 4 else f"fd82:{self.number}::1"

    @property
    def both(self) -> tuple[str, str]:
        return self.address(4), self.address(6)

    def sh(self, script: str, *, check: bool = True) -> str:
        return run(["sh", "-c", script], netns=self.path, check=check).stdout

    def connect(self, address: str, *, user: int = 0) -> str:
        """What the server there says of its peer. A process of that user inside; CommandError when it fails."""
        dial = f"exec 3<>/dev/tcp/{address}/{PORT} && cat <&3"
        who = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        return run([*who, "bash", "-c", dial], netns=self.path, seconds=10).stdout.removeprefix("::ffff:")

    def remove(self) -> None:
        remove_namespace(self.name)


class World:
    """`host` routes between `a`, `b` (pods) and `outside`; a server in both pods tells each client its address."""

    def __init__(self, made: contextlib.ExitStack) -> None:
        prefix = f"slu-hp-{os.getpid()}-{next(_numbers)}"

        def place(name: str, number: int) -> Place:
            one = Place(f"{prefix}-{name}", number)
            made.callback(one.remove)
            return one

        self.host, self.a, self.b, self.outside = (place(*one) for one in (("h", 0), ("a", 1), ("b", 2), ("o", 3)))
        for one in (self.a, self.b, self.outside):
            self._join(one)
        for one in (self.a, self.b):
            with Netns.open(one.path) as inside:
                made.callback(Server(inside).close)
        self._door = made.enter_context(Netns.open(self.host.path))
        self.target = HostNetns(self._door)
        made.callback(lambda: self.target.close())

    def _join(self, one: Place) -> None:
        near, far = ((f"{way(4)}/24", f"{way(6)}/64") for way in (one.host, one.address))
        join(Port(self.host.name, f"p{one.number}", near), Port(one.name, "eth0", far, (one.host(4), one.host(6))))

    def reopen(self) -> None:
        """As a new agent would: its predecessor's sockets are gone."""
        self.target.close()
        self.target = HostNetns(self._door)

    def dump(self) -> str:
        """Everything that the exemption may touch on the host, without counters."""
        text = self.host.sh(
            "nft list ruleset; ipset save; iptables-legacy-save; ip6tables-legacy-save; ip rule; ip -6 rule"
        )
        text = re.sub(r"packets \d+ bytes \d+", "packets N bytes N", text)
        return re.sub(r"\[\d+:\d+\]|# (Generated|Completed) .*| # handle \d+| # progname \w+", "", text)

    def members(self) -> dict[str, str]:
        """Address -> comment of all our sets, as nft or ipset prints them."""
        text = self.host.sh("nft list ruleset; ipset save")
        found = re.findall(r'([0-9a-f.:]+) comment "(?!sluice:)([^"]*)"', text)
        bare = re.findall(r"^add istio-\S+ (\S+)$", text, re.MULTILINE)
        return dict(found) | dict.fromkeys(bare, "")


@contextlib.contextmanager
def world() -> Iterator[World]:
    with contextlib.ExitStack() as made:
        yield World(made)


def claimed(*pairs: tuple[str, Sequence[str]]) -> Claims:
    claims = Claims()
    for uid, addresses in pairs:
        claims.claim(uid, addresses)
    return claims


# iptables-nft's table and base chain were ours and marked by a comment; legacy xtables has its own.
_BASES = """
for f in ip ip6; do nft add table $f nat '{ comment "sluice" ; }'; nft add chain $f nat POSTROUTING \\
  '{ type nat hook postrouting priority 100; policy accept; comment "sluice" ; }'; done
"""
_FORMER = """
ipset create istio-inpod-probes-v4 hash:ip family inet comment; ipset create istio-inpod-probes-v6 hash:ip family inet6
ipset add istio-inpod-probes-v4 192.0.2.7 comment uid-old
former() {
  $1 -t nat -N ISTIO_POSTRT
  $1 -t nat -A ISTIO_POSTRT $TAG -p tcp -m owner --socket-exists -m set --match-set $2 dst -j SNAT --to-source $3
  $1 -t nat -I POSTROUTING 1 $TAG -j ISTIO_POSTRT
}
TAG='-m comment --comment sluice:0123456789ab'
former iptables-KIND istio-inpod-probes-v4 169.254.7.127
former ip6tables-KIND istio-inpod-probes-v6 fd16:9254:7127:1337:ffff:ffff:ffff:ffff
"""


def make_former(node: World, variant: str) -> None:
    """The exemption in the form that earlier versions left on a node: `variant` is iptables or iptables-legacy."""
    bases, kind = (_BASES, "nft") if variant == "iptables" else ("", "legacy")
    node.host.sh(bases + _FORMER.replace("KIND", kind))
