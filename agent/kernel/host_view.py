# SPDX-License-Identifier: Apache-2.0
"""Netfilter in the host's own namespace, read passively: no table is made, no module loaded, no process started.

Detection that made the table which it then detected chose differently after every start (istio 61020). So nf_tables
is asked only where it is known to be in the kernel, and a legacy table only where /proc lists it.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from agent.core.errors import KernelError
from agent.core.model.host import HostTable, HostView, InKernel, Variant, variant
from agent.core.wire.netlink import Message, unpack_be, unpack_text
from agent.core.wire.nftables import GETCHAIN, GETTABLE, NFPROTO, Chain, Table, fields
from agent.kernel import xtables
from agent.kernel.exec import PATH
from agent.kernel.netlink.nf_tables import NftSocket

PROGRAMS = (
    "nft",
    "iptables",
    "ip6tables",
    "iptables-nft-restore",
    "ip6tables-nft-restore",
    "iptables-legacy-restore",
    "ip6tables-legacy-restore",
)
# Rules of an untouched table are its policies, one per hook, and the entry that ends it (iptable_nat.c and others).
_LEGACY = {"filter": 4, "nat": 5, "mangle": 6, "raw": 3, "security": 4}
_NAMES = {"ip": "ip_tables_names", "ip6": "ip6_tables_names"}
_FAMILY = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_BASE_CHAINS = {"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}

Nft = Callable[[], tuple[HostTable, ...]]
Legacy = Callable[[Mapping[str, list[str]]], tuple[HostTable, ...]]


def nft_tables() -> tuple[HostTable, ...]:
    """Reads the nf_tables tables of this thread's namespace: two dumps, of chains their counts and not their rules."""
    with contextlib.closing(NftSocket()) as nft:
        return _summary(nft.dump(GETTABLE, 0), nft.dump(GETCHAIN, 0))


def legacy_tables(listed: Mapping[str, list[str]]) -> tuple[HostTable, ...]:
    """Returns the listed tables per family of this thread's namespace, with their number of rules."""
    tables = xtables.read(sorted({name for names in listed.values() for name in names}), set())
    return tuple(
        # num_entries stands at byte 76 of struct ipt_getinfo.
        HostTable(
            word,
            name,
            xtables=True,
            nat=name == "nat",
            rules=struct.unpack_from("=I", raw[0], 76)[0] - _LEGACY.get(name, 1),
        )
        for word, family in (("ip", 4), ("ip6", 6))
        for name, raw in sorted(tables[family].items())
        if name in listed.get(word, ())
    )


def read_host_view(
    root: Path = Path("/"),
    release: str = "",
    path: str = PATH,
    nft: Nft = nft_tables,
    legacy: Legacy = legacy_tables,
) -> HostView:
    """Reads the view of this thread's namespace. `root` is where /proc, /sys, /lib, /boot and programs are.

    Nothing is raised: failures to read are reported in the remarks.
    """
    release = release or os.uname().release
    remarks = list[str]()
    state = _nf_tables(root, release)
    tables: tuple[HostTable, ...] | None = None if state is InKernel.UNKNOWN else ()
    if state in (InKernel.LOADED, InKernel.BUILT_IN):
        try:
            tables = nft()
        except (KernelError, OSError) as error:
            tables = None
            remarks.append(f"nf_tables of the host could not be read: {error}")
    old: tuple[HostTable, ...] | None = None
    try:
        listed = {family: _lines(root / "proc/thread-self/net" / name) for family, name in _NAMES.items()}
        old = legacy(listed) if any(listed.values()) else ()
    except (KernelError, OSError) as error:
        remarks.append(f"legacy tables of the host could not be read: {error}")
    programs = {name: program for name in PROGRAMS if (program := _program(root, name, path))}
    used = variant(programs.get("iptables", ""))
    if used is Variant.UNKNOWN:
        remarks.append(f"iptables is {programs['iptables']}, which may be of either variant")
    return HostView(
        release=release,
        ipv6=(root / "proc/thread-self/net/if_inet6").exists(),  # missing without IPv6 and with ipv6.disable=1
        nf_tables=state,
        nft=tables,
        legacy=old,
        programs=tuple(programs.items()),
        iptables=used,
        remarks=tuple(remarks),
    )


def _nf_tables(root: Path, release: str) -> InKernel:
    if (root / "sys/module/nf_tables").is_dir():
        return InKernel.LOADED
    modules = (root / "lib/modules" / release, root / "usr/lib/modules" / release)
    for path in (root / "proc/config.gz", root / f"boot/config-{release}", *(one / "config" for one in modules)):
        with contextlib.suppress(OSError, EOFError, zlib.error):
            text = path.read_bytes()
            lines = (gzip.decompress(text) if path.suffix == ".gz" else text).splitlines()
            if b"CONFIG_NF_TABLES=y" in lines:
                return InKernel.BUILT_IN
            return InKernel.NOT_LOADED if b"CONFIG_NF_TABLES=m" in lines else InKernel.ABSENT
    for path in modules:
        for name, state in (("modules.builtin", InKernel.BUILT_IN), ("modules.dep", InKernel.NOT_LOADED)):
            with contextlib.suppress(OSError):
                if "/nf_tables.ko" in (path / name).read_text():
                    return state
    return InKernel.UNKNOWN


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except FileNotFoundError:
        return []  # no module, no tables


def _program(root: Path, name: str, path: str) -> str:
    """Its file behind all links, "" when it is not installed. Absolute links mean below `root`."""
    for directory in path.split(":"):
        file = root / directory.lstrip("/") / name
        for _ in range(20):
            try:
                target = file.readlink()
            except OSError:
                break
            file = root / str(target).lstrip("/") if target.is_absolute() else file.parent / target
        if file.is_file() and os.access(file, os.X_OK):
            return "/" + os.path.relpath(file, root)
    return ""


def _summary(tables: Iterable[Message], chains: Iterable[Message]) -> tuple[HostTable, ...]:
    """Summarizes the dumps. Tables of iptables-nft: ip and ip6, base chains with the upper-case names of iptables."""
    by_table: dict[tuple[int, bytes], list[dict[int, bytes]]] = {}
    for message in chains:
        parts = fields(message.body)
        by_table.setdefault((message.body[0], parts.get(Chain.TABLE, b"")), []).append(parts)
    summary = []
    for message in tables:
        family = message.body[0]
        raw = fields(message.body).get(Table.NAME, b"")
        base = [chain for chain in by_table.get((family, raw), []) if Chain.HOOK in chain]
        name = unpack_text(raw)
        names = {unpack_text(chain.get(Chain.NAME)) for chain in base}
        summary.append(
            HostTable(
                _FAMILY.get(family, str(family)),
                name,
                xtables=family in NFPROTO.values() and name in _LEGACY and bool(names) and names <= _BASE_CHAINS,
                nat=any(unpack_text(chain.get(Chain.TYPE)) == "nat" for chain in base),
                rules=sum(unpack_be(chain.get(Chain.USE)) for chain in base),  # its rules
            )
        )
    return tuple(summary)
