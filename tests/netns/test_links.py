# SPDX-License-Identifier: Apache-2.0
"""The lab's namespaces are those of `ip netns`, and two of them reach each other as soon as they are joined."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.core.errors import SluiceError
from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.lab.links import NETNS_DIR, NO_DAD, Port, add_namespace, join, links, remove_namespace

pytestmark = pytest.mark.root


@pytest.fixture
def names() -> Iterator[tuple[str, str]]:
    one, other = (f"slu-ln-{os.getpid()}-{end}" for end in "ab")
    try:
        yield one, other
    finally:
        remove_namespace(one)
        remove_namespace(other)


def mount(name: str) -> list[str]:
    """Options, propagation, type and source of the mount, without numbers."""
    lines = map(str.split, Path("/proc/self/mountinfo").read_text().splitlines())
    (found,) = (words[5:] for words in lines if words[4].endswith(f"/netns/{name}"))
    return [word.partition(":")[0] for word in found]


def test_a_namespace_is_as_ip_netns_makes_it(names: tuple[str, str]) -> None:
    one, other = names
    run(["ip", "netns", "add", other])
    add_namespace(one, NO_DAD)
    assert mount(one) == mount(other)
    assert (NETNS_DIR / one).stat().st_mode == (NETNS_DIR / other).stat().st_mode
    inside = "ip netns identify; cat /proc/sys/net/ipv6/conf/default/accept_dad; ip -o link show up"
    shown = run(["ip", "netns", "exec", one, "sh", "-c", inside]).stdout.split()
    assert shown[:4] == [one, "0", "1:", "lo:"]
    run(["ip", "netns", "del", one])
    assert not (NETNS_DIR / one).exists()


def test_a_name_that_is_in_use_is_refused(names: tuple[str, str]) -> None:
    add_namespace(names[0])
    with Netns.open(NETNS_DIR / names[0]) as before:
        with pytest.raises(SluiceError, match=f"{names[0]}: File exists"):
            add_namespace(names[0])
        with Netns.open(NETNS_DIR / names[0]) as after:
            assert after.id == before.id


@pytest.mark.parametrize(("near", "far"), [("10.9.0.1/24", "10.9.0.2/24"), ("fd09::1/64", "fd09::2/64")])
def test_joined_namespaces_reach_each_other_at_once(names: tuple[str, str], near: str, far: str) -> None:
    one, other = names
    add_namespace(one)
    add_namespace(other)
    gateway = near.partition("/")[0]
    join(Port(one, "p1", (near,)), Port(other, "eth0", (far,), (gateway,)), address="02:00:00:00:00:07")
    family = socket.AF_INET6 if ":" in near else socket.AF_INET
    with Netns.open(NETNS_DIR / one) as here, Netns.open(NETNS_DIR / other) as there:
        server, client = here.call(lambda: socket.socket(family)), there.call(lambda: socket.socket(family))
    with server, client:
        server.bind((gateway, 7))
        server.listen()
        client.settimeout(0.5)
        client.connect(server.getsockname()[:2])
    assert "02:00:00:00:00:07" in run(["ip", "-n", other, "link", "show", "eth0"]).stdout
    version = "-6" if ":" in near else "-4"
    assert f"default via {gateway} dev eth0" in run(["ip", version, "-n", other, "route"]).stdout


def test_links_go_by_name(names: tuple[str, str]) -> None:
    add_namespace(names[0])
    with links(names[0]) as inside:
        inside.bridge("br0")
        inside.veth("v0", "v1")
        inside.tap("tap0")
        inside.up("tap0", master="br0")
        assert sorted(inside.names("veth")) == ["v0", "v1"]
        assert inside.state("v1") == "DOWN"
        assert "master br0" in run(["ip", "-n", names[0], "link", "show", "tap0"]).stdout
        inside.delete("v1")
        inside.delete("v1")
        assert inside.names("veth") == []


def test_what_the_kernel_refuses_is_an_error_of_the_namespace(names: tuple[str, str]) -> None:
    add_namespace(names[0])
    with (
        pytest.raises(SluiceError, match=f"rtnetlink in {names[0]}: Network is unreachable"),
        links(names[0]) as inside,
    ):
        inside.add_route("10.9.0.0/16", "192.0.2.1")
    with pytest.raises(SluiceError, match=f"{names[0]}: no interface eth7"), links(names[0]) as inside:
        inside.up("eth7")
