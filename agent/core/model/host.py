# SPDX-License-Identifier: Apache-2.0
"""Netfilter as the host's own network namespace uses it, read without changing anything. Pure."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from enum import Enum


class InKernel(Enum):
    """State of nf_tables in the kernel. Only the first two may be queried: a query would load the module."""

    LOADED = "loaded"
    BUILT_IN = "built in"
    NOT_LOADED = "a module that is not loaded"
    ABSENT = "not in this kernel"
    UNKNOWN = "unknown, so not asked"


class Variant(Enum):
    """Variants of iptables: the tables that a program of that name writes to."""

    NFT = "nf_tables"
    LEGACY = "legacy"
    NONE = "not installed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class HostTable:
    """A table of family "ip", "ip6" or "inet" and others; `rules` are those of its base chains.

    `xtables`: an iptables program made it, of either variant. `nat`: it has chains that may translate addresses.
    """

    family: str
    name: str
    _: KW_ONLY
    xtables: bool
    nat: bool
    rules: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostView:
    """`nft` and `legacy` are None where it could not be known what is there; () is known to be nothing.

    `programs` are (name, path behind all links) of those installed, `iptables` is what the one of that name writes.
    """

    release: str
    ipv6: bool
    nf_tables: InKernel
    nft: tuple[HostTable, ...] | None
    legacy: tuple[HostTable, ...] | None
    programs: tuple[tuple[str, str], ...] = ()
    iptables: Variant = Variant.NONE
    remarks: tuple[str, ...] = ()

    def has(self, program: str) -> bool:
        return program in dict(self.programs)

    def xtables_rules(self, variant: Variant, table: str = "") -> int:
        """Returns the number of rules of that variant in one table, or in all of them, both families together."""
        tables = (self.nft if variant is Variant.NFT else self.legacy) or ()
        return sum(one.rules for one in tables if one.xtables and table in ("", one.name))


def variant(path: str) -> Variant:
    """Returns the variant of the program at `path` (links resolved); UNKNOWN for wrappers of distributions."""
    name = path.rpartition("/")[2]
    if name in ("xtables-nft-multi", "iptables-nft", "ip6tables-nft"):
        return Variant.NFT
    if name in ("xtables-legacy-multi", "xtables-multi", "iptables-legacy", "ip6tables-legacy"):
        return Variant.LEGACY  # xtables-multi: iptables before 1.8 had no other
    return Variant.UNKNOWN if path else Variant.NONE
