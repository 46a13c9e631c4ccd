# SPDX-License-Identifier: Apache-2.0
"""Claims of pods to addresses, as pods come and go in any order. Pure.

While a pod terminates its address may be another's already, and events overtake one another (weave 2632, istio
56570): so every claim is kept until it is released, and the newest one that is left counts.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from types import MappingProxyType

from agent.backends.hostprobes.want import HostProbes


class Claims:
    """Claims of enrolled pods on addresses, by pod UID."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[str, ...]] = {}  # uid -> addresses
        self._on: dict[str, list[str]] = {}  # address -> uids, oldest first

    def claim(self, uid: str, addresses: Iterable[str]) -> bool:
        """Records that the enrolled pod has these addresses. Returns True if anything changed.

        Without any that can be used, nothing is known of them now, and the pod keeps what it had (istio 60471).
        Repeating a claim does not change its age. Invalid addresses are ignored.
        """
        wanted = usable(addresses)
        had = self._of.get(uid)
        if had is not None and (not wanted or wanted == had):
            return False
        for address in set(had or ()) - set(wanted):
            self._drop(uid, address)
        for address in wanted:
            on = self._on.setdefault(address, [])
            if uid not in on:
                on.append(uid)
        self._of[uid] = wanted
        return True

    def release(self, uid: str) -> bool:
        """Drops the claims of a pod that is gone or no longer enrolled. Returns True if it had any."""
        had = self._of.pop(uid, None)
        for address in had or ():
            self._drop(uid, address)
        return had is not None

    def _drop(self, uid: str, address: str) -> None:
        self._on[address].remove(uid)
        if not self._on[address]:
            del self._on[address]

    def of(self, uid: str) -> tuple[str, ...]:
        """Returns those that are the pod's by now: of two that claim one address the newer has it."""
        return tuple(address for address in self._of.get(uid, ()) if self._on[address][-1] == uid)

    def want(self, probe_ipv4: str, probe_ipv6: str, *, ipv6: bool, complete: bool) -> HostProbes:
        """Returns what the host has to hold; `complete` says that all enrolled pods have claimed."""
        members = MappingProxyType({address: on[-1] for address, on in sorted(self._on.items())})
        unknown = frozenset(uid for uid, addresses in self._of.items() if not addresses)
        return HostProbes(
            members, probe_ipv4=probe_ipv4, probe_ipv6=probe_ipv6, ipv6=ipv6, unknown=unknown, complete=complete
        )


def usable(addresses: Iterable[str]) -> tuple[str, ...]:
    """Returns them sorted, as module ipaddress writes them, mapped IPv4 as IPv4, without loopback and link-local."""
    texts = set()
    for text in addresses:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            continue
        address = getattr(address, "ipv4_mapped", None) or address
        if not (address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast):
            texts.add(str(address))
    return tuple(sorted(texts))
