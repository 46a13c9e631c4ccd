# SPDX-License-Identifier: Apache-2.0
"""The host's view from directories laid out as hosts have them; nothing is asked of this machine's kernel."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path

import pytest

from agent.core.errors import KernelError
from agent.core.model.host import HostTable, HostView, InKernel, Variant
from agent.kernel import host_view

RELEASE = "6.1.0-9-amd64"
CHAINED = HostTable("ip", "nat", xtables=True, nat=True, rules=2)


class Host:
    """A root directory, and a kernel that counts how often it is asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tables: tuple[HostTable, ...] = ()
        self.asked: list[str] = []
        self.file("proc/thread-self/net/if_inet6")

    def file(self, name: str, content: str | bytes = "") -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def link(self, name: str, target: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def program(self, name: str) -> None:
        self.file(name, "#!")
        (self.root / name).chmod(0o755)

    def debian(self, variant: str) -> None:
        """Programs as Debian has them: alternatives, with absolute links."""
        for multi in ("xtables-nft-multi", "xtables-legacy-multi"):
            self.program(f"usr/sbin/{multi}")
        for six in ("", "6"):
            self.link(f"usr/sbin/ip{six}tables", f"/etc/alternatives/ip{six}tables")
            self.link(f"etc/alternatives/ip{six}tables", f"/usr/sbin/ip{six}tables-{variant}")
            for one in ("nft", "legacy"):
                self.link(f"usr/sbin/ip{six}tables-{one}", f"xtables-{one}-multi")
                self.link(f"usr/sbin/ip{six}tables-{one}-restore", f"xtables-{one}-multi")

    def look(self) -> HostView:
        def nft() -> tuple[HostTable, ...]:
            self.asked.append("nf_tables")
            return self.tables

        def legacy(listed: Mapping[str, list[str]]) -> tuple[HostTable, ...]:
            self.asked += [f"{family} {name}" for family, names in listed.items() for name in names]
            return tuple(
                HostTable(f, name, xtables=True, nat=name == "nat", rules=1)
                for f, names in listed.items()
                for name in names
            )

        before = self.files()
        view = host_view.read_host_view(self.root, RELEASE, nft=nft, legacy=legacy)
        assert self.files() == before
        return view

    def files(self) -> list[str]:
        return sorted(str(path) for path in self.root.rglob("*"))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_legacy_only(host: Host) -> None:
    host.debian("legacy")
    host.file(f"lib/modules/{RELEASE}/modules.builtin", "kernel/fs/ext4/ext4.ko\n")
    host.file(f"lib/modules/{RELEASE}/modules.dep", "kernel/net/netfilter/nf_tables.ko.xz: a\n")
    host.file("proc/thread-self/net/ip_tables_names", "nat\nfilter\n")
    host.file("proc/thread-self/net/ip6_tables_names", "filter\n")
    view = host.look()
    assert view.iptables is Variant.LEGACY and view.nf_tables is InKernel.NOT_LOADED and view.nft == ()
    assert host.asked == ["ip nat", "ip filter", "ip6 filter"], "nf_tables is not asked: that would load it"
    assert view.xtables_rules(Variant.LEGACY) == 3 and view.xtables_rules(Variant.LEGACY, "nat") == 1
    assert view.xtables_rules(Variant.NFT) == 0


def test_nft_only(host: Host) -> None:
    host.debian("nft")
    host.file("sys/module/nf_tables/initstate", "live\n")
    host.tables = (CHAINED,)
    view = host.look()
    assert view.iptables is Variant.NFT and view.nf_tables is InKernel.LOADED and view.legacy == ()
    assert host.asked == ["nf_tables"] and view.xtables_rules(Variant.NFT, "nat") == 2
    assert view.has("iptables-nft-restore") and view.has("ip6tables-legacy-restore") and not view.has("nft")


def test_both(host: Host) -> None:
    host.debian("nft")
    host.file("sys/module/nf_tables/initstate")
    host.file("proc/thread-self/net/ip_tables_names", "nat\n")
    host.tables = (CHAINED,)
    view = host.look()
    assert view.xtables_rules(Variant.NFT) == 2 and view.xtables_rules(Variant.LEGACY) == 1


def test_neither(host: Host) -> None:
    host.file("proc/config.gz", gzip.compress(b"CONFIG_NET=y\n# CONFIG_NF_TABLES is not set\n"))
    host.file("proc/thread-self/net/ip_tables_names")
    view = host.look()
    assert (view.nf_tables, view.nft, view.legacy) == (InKernel.ABSENT, (), ())
    assert view.iptables is Variant.NONE and not view.programs and not host.asked and not view.remarks


def test_firewalld_has_tables_but_none_of_iptables(host: Host) -> None:
    host.file("sys/module/nf_tables/initstate")
    host.program("usr/sbin/nft")
    host.tables = (HostTable("inet", "firewalld", xtables=False, nat=True, rules=40),)
    view = host.look()
    assert view.xtables_rules(Variant.NFT) == 0 and view.has("nft") and view.nft == host.tables


def test_k3s_brings_a_wrapper_that_tells_nothing(host: Host) -> None:
    host.file("boot/config-" + RELEASE, "CONFIG_NF_TABLES=y\n")
    host.link("usr/sbin/iptables", "/var/lib/rancher/k3s/data/current/bin/aux/iptables")
    host.link("var/lib/rancher/k3s/data/current/bin/aux/iptables", "iptables-detect.sh")
    host.program("var/lib/rancher/k3s/data/current/bin/aux/iptables-detect.sh")
    view = host.look()
    assert view.iptables is Variant.UNKNOWN and "iptables-detect.sh" in view.remarks[0]
    assert view.nf_tables is InKernel.BUILT_IN and host.asked == ["nf_tables"]


@pytest.mark.parametrize(
    ("name", "content", "state"),
    [
        ("proc/config.gz", gzip.compress(b"CONFIG_NF_TABLES=m\n"), InKernel.NOT_LOADED),
        ("proc/config.gz", gzip.compress(b"CONFIG_NF_TABLES=y\n"), InKernel.BUILT_IN),
        ("proc/config.gz", b"not gzip at all", InKernel.UNKNOWN),
        (f"usr/lib/modules/{RELEASE}/config", b"CONFIG_NF_TABLES=y\n", InKernel.BUILT_IN),
        (f"usr/lib/modules/{RELEASE}/modules.builtin", b"kernel/net/netfilter/nf_tables.ko\n", InKernel.BUILT_IN),
        ("lib/modules/other/modules.builtin", b"kernel/net/netfilter/nf_tables.ko\n", InKernel.UNKNOWN),
    ],
)
def test_where_nf_tables_is_decides_if_it_is_asked(host: Host, name: str, content: bytes, state: InKernel) -> None:
    host.file(name, content)
    view = host.look()
    assert view.nf_tables is state
    assert host.asked == (["nf_tables"] if state is InKernel.BUILT_IN else [])
    assert (view.nft is None) is (state is InKernel.UNKNOWN)


def test_what_cannot_be_read_is_told_and_not_taken_for_nothing(host: Host) -> None:
    host.file("sys/module/nf_tables/initstate")
    host.file("proc/thread-self/net/ip_tables_names", "nat")

    def refuse(*_: object) -> tuple[HostTable, ...]:
        raise KernelError("read", 1, "Operation not permitted")

    view = host_view.read_host_view(host.root, RELEASE, nft=refuse, legacy=refuse)
    assert view.nft is None and view.legacy is None and len(view.remarks) == 2


def test_p36_a_kernel_without_ipv6_is_seen(host: Host) -> None:
    assert host.look().ipv6
    (host.root / "proc/thread-self/net/if_inet6").unlink()
    assert not host.look().ipv6


def test_links_in_a_circle_are_no_program(host: Host) -> None:
    host.link("usr/sbin/nft", "nft")
    host.file("usr/bin/iptables", "not executable")
    assert not host.look().programs
