# SPDX-License-Identifier: Apache-2.0
"""A pod's namespace for tests of rules: made, entered by handle, dumped, removed; and both choices of backend."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from agent.backends.base import PodLayer
from agent.backends.conntrack import ConntrackBackend
from agent.backends.iptables.backend import IptablesBackend
from agent.backends.iptables.legacy import IptablesLegacyBackend
from agent.backends.nftables.backend import NftablesBackend
from agent.backends.routing import RoutingBackend
from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.kernel.pod_netns import PodNetns
from agent.lab.links import add_namespace, remove_namespace

CHOICES = ("nftables", "iptables", "iptables-legacy")


def layers(name: str) -> tuple[PodLayer, ...]:
    """The layers of one choice; nftables with owned tables where the kernel has them."""
    nftables = NftablesBackend()
    assert nftables.probe().ok
    netfilter = {"nftables": nftables, "iptables": IptablesBackend(), "iptables-legacy": IptablesLegacyBackend()}
    return (RoutingBackend(), ConntrackBackend(), netfilter[name])


class Pod:
    """A network namespace with a handle as the agent holds one."""

    def __init__(self, name: str) -> None:
        self.name, self.path = name, Path("/run/netns", name)
        self.target = PodNetns(Netns.open(self.path))

    def sh(self, script: str, *, check: bool = True) -> str:
        return run(["sh", "-c", script], netns=self.path, check=check).stdout

    def reopen(self) -> None:
        """As a new agent would: its predecessor's sockets are gone."""
        self.target.close()
        self.target = PodNetns(Netns.open(self.path))

    def dump(self) -> str:
        """Everything that capture may touch, without counters."""
        text = self.sh(
            "nft list ruleset; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all;"
            " for v in ip ip6; do ${v}tables-legacy-save; done | grep -v '^#' || true;"
            " grep -H . /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_*"
        )
        text = re.sub(r"packets \d+ bytes \d+", "packets N bytes N", text)
        return re.sub(r" # handle \d+| # progname \w+", "", text)


@contextlib.contextmanager
def pod(name: str = "slu-tt-pod", sysctls: Mapping[str, int] = MappingProxyType({})) -> Iterator[Pod]:
    unique = f"{name}-{os.getpid()}"
    add_namespace(unique, sysctls)
    try:
        made = Pod(unique)
        try:
            yield made
        finally:
            made.target.close()
    finally:
        remove_namespace(unique)
