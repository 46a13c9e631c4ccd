# SPDX-License-Identifier: Apache-2.0
"""The wrapper of libbpf on the real kernel: loading, pins, links to cgroups, namespaces and interfaces."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import bpftool
from support.bpfnode import U64, BpfNode, bpf_node, key, opened
from support.node import until
from support.rules import Pod, pod

from agent.core.errors import KernelError
from agent.kernel.bpf import bpffs, load, syscall
from agent.kernel.bpf import link as bpflink
from agent.kernel.bpf.map import Map
from agent.kernel.bpf.syscall import AttachType
from agent.kernel.exec import run
from agent.lab.links import links

pytestmark = pytest.mark.root
PROGRAMS = ("on_connect4", "on_lookup", "on_packet")
HANDSHAKE = "exec 3<>/dev/tcp/127.0.0.1/{port}"


def attach(node: BpfNode, program: str, name: str, attacher: Callable[[int], int]) -> None:
    """Attaches, pins and lets go of everything but the pin."""
    with opened(node.program(program)) as fd:
        link = attacher(fd)
    try:
        syscall.pin(link, node.link(name))
    finally:
        os.close(link)


def link_info(node: BpfNode, name: str) -> bpflink.LinkInfo:
    with opened(node.link(name)) as fd:
        return bpflink.info(fd)


def program(node: BpfNode, name: str, port: int = 1) -> syscall.ProgramInfo:
    with opened(node.program(name, port)) as fd:
        return syscall.program_info(fd)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[BpfNode]:
    with bpf_node(tmp_path) as made:
        yield made


@pytest.fixture
def table(node: BpfNode) -> Iterator[Map]:
    node.load()
    with Map.open(node.maps / "table") as made:
        yield made


@pytest.fixture
def inside() -> Iterator[Pod]:
    with pod("slu-bpf") as made:
        yield made


@pytest.fixture
def cgroup() -> Iterator[Path]:
    made = bpffs.cgroup_root() / f"slu-bpf-{os.getpid()}"
    made.mkdir()
    try:
        yield made
    finally:
        with contextlib.suppress(FileNotFoundError):
            made.rmdir()


def connect(inside: Pod, cgroup: Path) -> None:
    """Connects once, from that cgroup, to a port without a listener."""
    dial = HANDSHAKE.format(port=9)
    run(["bash", "-c", f"echo $$ > {cgroup}/cgroup.procs && ! {dial}"], netns=inside.path)


# --- loading


def test_everything_is_pinned_and_described(node: BpfNode) -> None:
    assert node.load(table=100) == PROGRAMS
    assert {path.name for path in node.maps.iterdir()} == {"table", "counts", "sockets", "ranges"}
    assert sorted(path.name for path in node.program("x").parent.iterdir()) == [f"{name}@1" for name in PROGRAMS]
    info = program(node, "on_connect4")
    shown = bpftool.shown("prog", "show", "pinned", str(node.program("on_connect4")))
    assert (shown["id"], shown["type"], shown["name"], shown["tag"], shown["map_ids"]) == (
        info.id, "cgroup_sock_addr", info.name, info.tag, list(info.maps),
    )  # fmt: skip
    with Map.open(node.maps / "table") as table:
        assert (table.type, table.key_size, table.value_size, table.max_entries) == (1, 4, 8, 100)


def test_a_second_load_shares_maps_and_keeps_what_is_the_same(node: BpfNode) -> None:
    node.load(table=100)
    with Map.open(node.maps / "table") as table:
        table.update(key(5), U64.pack(7))
        before = program(node, "on_connect4")
        assert node.load(table=200) == PROGRAMS, "another size than the pinned map's must not matter"
        assert program(node, "on_connect4") == before
        node.load(2)
        newer = program(node, "on_connect4", 2)
        assert newer.tag != before.tag and table.id in newer.maps and table.id in before.maps
    with Map.open(node.maps / "table") as table:
        assert (table.lookup(key(5)), table.max_entries) == (U64.pack(7), 100)


def test_a_program_on_maps_that_nobody_else_sees_is_replaced(node: BpfNode) -> None:
    node.load()
    before = program(node, "on_connect4")
    bpffs.remove_tree(node.maps)
    node.load()
    after = program(node, "on_connect4")
    assert (after.tag, after.id != before.id) == (before.tag, True)
    with Map.open(node.maps / "table") as table:
        assert table.id in after.maps and table.id not in before.maps


def test_the_verifiers_refusal_is_one_line_and_nothing_is_printed(
    node: BpfNode, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KernelError) as caught:
        load.load(node.compile("refused"), node.maps, {"refused": node.program("refused")})
    text = str(caught.value)
    assert caught.value.errno == errno.EACCES
    assert "\n" not in text and len(text) < 600
    assert "R0 invalid mem access 'map_value_or_null'" in text and "refused.o" not in capfd.readouterr().err
    assert syscall.find(node.program("refused")) is None
    assert capfd.readouterr() == ("", "")


def test_what_is_no_object_file_is_said(node: BpfNode) -> None:
    (node.objects / "text.o").write_text("no object")
    for name, number in (("missing.o", errno.ENOENT), ("text.o", None)):
        with pytest.raises(KernelError, match=name) as caught:
            load.load(node.objects / name, node.maps, {})
        assert number in (None, caught.value.errno)


def test_a_pinned_map_of_another_shape_is_said(node: BpfNode) -> None:
    node.load()
    (node.maps / "counts").unlink()
    (node.maps / "table").rename(node.maps / "counts")
    with pytest.raises(KernelError, match=r"couldn't reuse pinned map.*counts"):
        node.load()


# --- links


def test_a_link_to_a_cgroup_lives_by_its_pin_and_changes_programs_in_place(
    node: BpfNode, inside: Pod, cgroup: Path, table: Map
) -> None:
    table.update(key(2), U64.pack(0))
    descriptor = os.open(cgroup, os.O_RDONLY)
    try:
        kind = AttachType.CGROUP_INET4_CONNECT
        attach(node, "on_connect4", "connect4", lambda fd: bpflink.attach_cgroup(fd, descriptor, kind))
    finally:
        os.close(descriptor)
    first = link_info(node, "connect4")
    assert (first.program_id, first.target) == (program(node, "on_connect4").id, cgroup.stat().st_ino)
    connect(inside, cgroup)
    assert (node.counted(0), table.lookup(key(2))) == (1, U64.pack(0))

    node.load(2)
    with opened(node.link("connect4")) as link, opened(node.program("on_connect4", 2)) as newer:
        bpflink.update(link, newer)
    assert link_info(node, "connect4") == bpflink.LinkInfo(
        first.id, program(node, "on_connect4", 2).id, cgroup.stat().st_ino
    )
    connect(inside, cgroup)
    assert (node.counted(0), table.lookup(key(2))) == (2, U64.pack(2)), "the other program, and on the same map"

    with opened(node.link("connect4")) as kept:
        node.link("connect4").unlink()
        assert bpflink.info(kept).id == first.id
    connect(inside, cgroup)
    assert node.counted(0) == 2


def test_a_link_whose_cgroup_is_removed_has_no_target(node: BpfNode, cgroup: Path, table: Map) -> None:
    descriptor = os.open(cgroup, os.O_RDONLY)
    kind = AttachType.CGROUP_INET4_CONNECT
    attach(node, "on_connect4", "connect4", lambda fd: bpflink.attach_cgroup(fd, descriptor, kind))
    os.close(descriptor)
    cgroup.rmdir()
    until(lambda: link_info(node, "connect4").target == 0, "the link is detached")


def listening(inside: Pod) -> socket.socket:
    made = inside.target.netns.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    made.bind(("127.0.0.1", 5000))
    made.listen()
    return made


def test_a_link_to_a_namespace_and_a_listener_in_a_sockhash(node: BpfNode, inside: Pod, table: Map) -> None:
    netns, dial = inside.target.netns, ["bash", "-c", HANDSHAKE.format(port=7777)]
    kind = AttachType.SK_LOOKUP
    with listening(inside) as listener, Map.open(node.maps / "sockets") as sockets:
        assert run(dial, netns=inside.path, check=False).returncode == 1
        attach(node, "on_lookup", "lookup", lambda fd: bpflink.attach_netns(fd, netns.fd, kind))
        info = link_info(node, "lookup")
        assert (info.program_id, info.target) == (program(node, "on_lookup").id, netns.id.inode)
        assert run(dial, netns=inside.path, check=False).returncode == 1, "no listener in the map: refused"

        sockets.update_fd(key(0), listener.fileno())
        cookie = listener.getsockopt(socket.SOL_SOCKET, 57, 8)  # SO_COOKIE
        assert (sockets.lookup(key(0)), sockets.lookup(key(1))) == (cookie, None)
        assert (sockets.keys(), sockets.items()) == ([key(0)], [(key(0), cookie)])
        run(dial, netns=inside.path)
        accepted, _ = listener.accept()
        assert accepted.getsockname() == ("127.0.0.1", 7777)
        accepted.close()
    with Map.open(node.maps / "sockets") as sockets:
        assert sockets.keys() == [], "the kernel takes a closed socket out"
    run(["bpftool", "link", "detach", "pinned", str(node.link("lookup"))])
    assert link_info(node, "lookup").target == 0


def test_a_link_of_a_namespace_that_ended_has_no_target(node: BpfNode, table: Map) -> None:
    with pod("slu-bpf-gone") as gone:
        fd = gone.target.netns.fd
        attach(node, "on_lookup", "lookup", lambda each: bpflink.attach_netns(each, fd, AttachType.SK_LOOKUP))
        assert link_info(node, "lookup").target == gone.target.netns.id.inode
    until(lambda: link_info(node, "lookup").target == 0, "the namespace ends")


def test_tcx_links_are_of_an_interface_inside(node: BpfNode, inside: Pod, table: Map) -> None:
    with links(inside.name) as network:
        network.veth("slu0", "slu1")
        network.up("slu1")
        network.add_addresses("slu0", "10.9.9.1/24")
        index = network.index("slu0")
        network.rtnl.neigh("add", dst="10.9.9.9", lladdr="02:00:00:00:00:09", ifindex=index, state="permanent")
    netns = inside.target.netns
    for name, kind in (("ingress", AttachType.TCX_INGRESS), ("egress", AttachType.TCX_EGRESS)):
        attach(node, "on_packet", name, lambda fd, k=kind: netns.call(lambda: bpflink.attach_tcx(fd, index, k)))
        info = link_info(node, name)
        assert (info.program_id, info.target) == (program(node, "on_packet").id, index)
    sees = bpftool.shown("link", "show", "pinned", str(node.link("egress")), netns=inside.path)
    assert sees["prog_id"] == program(node, "on_packet").id
    before = node.counted(1)
    inside.sh("bash -c 'echo x > /dev/udp/10.9.9.9/9'")
    assert node.counted(1) > before
    with links(inside.name) as network:
        network.delete("slu0")
    until(lambda: {link_info(node, name).target for name in ("ingress", "egress")} == {0}, "the links have no target")


def test_attaching_says_what_is_wrong(node: BpfNode, inside: Pod, table: Map) -> None:
    with opened(node.program("on_packet")) as fd, pytest.raises(KernelError, match="interface 4711") as caught:
        inside.target.netns.call(lambda: bpflink.attach_tcx(fd, 4711, AttachType.TCX_INGRESS))
    assert caught.value.errno == errno.ENODEV
    with pytest.raises(KernelError, match="No such file") as caught:
        syscall.get(node.link("nothing"))
    assert caught.value.errno == errno.ENOENT
    assert syscall.find(node.link("nothing")) is None
