# SPDX-License-Identifier: Apache-2.0
"""HostProbes: the pods that the node connects to from the probe address; and what to change. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Final

SETS: Final = {4: "istio-inpod-probes-v4", 6: "istio-inpod-probes-v6"}


@dataclass(frozen=True, slots=True)
class HostProbes:
    """The intent for the host. `members`: address of an enrolled pod -> its UID.

    `unknown` are enrolled pods with unknown addresses. What earlier agents entered for them stays, and
    unless `complete` all that they entered for any pod: an agent that has just started has not seen all pods.
    """

    members: Mapping[str, str]
    _: KW_ONLY
    probe_ipv4: str
    probe_ipv6: str
    ipv6: bool = True
    unknown: frozenset[str] = frozenset()
    complete: bool = True

    def within(self, *, ipv6: bool) -> HostProbes:
        """Returns the same intent on a host that has IPv6, or has it switched off."""
        return self if ipv6 or not self.ipv6 else replace(self, ipv6=False)

    @property
    def families(self) -> tuple[int, ...]:
        return (4, 6) if self.ipv6 else (4,)

    def probe(self, family: int) -> str:
        return self.probe_ipv4 if family == 4 else self.probe_ipv6

    def of(self, family: int) -> dict[str, str]:
        """Members of family 4 or 6."""
        return {address: uid for address, uid in self.members.items() if (":" in address) is (family == 6)}

    def keeps(self, owner: str) -> bool:
        """True if an entry of that owner, "" if it names no owner, stays although no pod claims its address."""
        return not self.complete or owner in self.unknown or (not owner and bool(self.unknown))


@dataclass(frozen=True, slots=True)
class SetChange:
    """Changes of one set. `added` and `renamed`: address -> UID; `renamed` ones are there under another."""

    added: Mapping[str, str]
    renamed: Mapping[str, str]
    removed: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.renamed or self.removed)

    def words(self, name: str) -> str:
        """Describes the change, as "set NAME: 2 addresses missing, 1 not wanted"."""
        counts = ((self.added, "missing"), (self.renamed, "of another owner"), (self.removed, "not wanted"))
        return f"set {name}: " + ", ".join(f"{len(part)} addresses {word}" for part, word in counts if part)


def change(want: HostProbes, family: int, have: Mapping[str, str]) -> SetChange:
    """Compares with `have`: address -> UID or ""."""
    wanted = want.of(family)
    return SetChange(
        {address: uid for address, uid in wanted.items() if address not in have},
        {address: uid for address, uid in wanted.items() if have.get(address, uid) != uid},
        tuple(address for address, owner in sorted(have.items()) if address not in wanted and not want.keeps(owner)),
    )


def settled(want: HostProbes, family: int, have: Mapping[str, str]) -> dict[str, str]:
    """Returns the members of a re-created set: all desired ones, and those of the former that stay."""
    kept = {address: owner for address, owner in have.items() if want.keeps(owner)}
    return kept | want.of(family)
