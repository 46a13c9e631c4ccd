# SPDX-License-Identifier: Apache-2.0
"""Nodes as network namespaces on one segment: `up` creates them, `down` removes everything with the prefix.

    <prefix>-lan: br0 ── node1 ══ eth0 :<prefix>-node1 ── veth of each pod (made by the CNI plugin)
                      └─ node2 ══ eth0 :<prefix>-node2

Every interface is created inside its namespace, so names never meet those of the host or of another lab.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from agent.core.errors import SluiceError
from agent.core.wire.rtnetlink import LOOPBACK_INDEX
from agent.kernel.bpf import bpffs
from agent.kernel.exec import run
from agent.kernel.netns import Netns, unpin
from agent.lab.lab_spec import BPFFS, LabSpec

if TYPE_CHECKING:
    from pyroute2 import IPRoute  # its import takes up to half a second, which `sluice --help` need not wait for

NETNS_DIR = Path("/run/netns")

# Without duplicate address detection an IPv6 address is usable at once: the lab's addresses cannot clash.
NO_DAD = ("net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0")
_BRIDGE = "br0"
_FORWARD = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")


def claim(spec: LabSpec) -> None:
    """Creates /run/<prefix>: if two processes build the same lab at once, one is refused, and must not clean up."""
    refused = SluiceError(f"lab {spec.prefix} exists already; first run: sluice lab down --prefix {spec.prefix}")
    if namespaces(spec.prefix) or pins(spec.prefix):
        raise refused
    try:
        spec.run_dir.mkdir(mode=0o700)
    except FileExistsError:
        raise refused from None


def up(spec: LabSpec) -> None:
    """Creates segment and nodes, all routes included, after `claim`. Raises SluiceError; then call `down`."""
    add_namespace(spec.lan, NO_DAD)
    configure(spec.lan, _bridge)
    for node in spec.nodes:
        spec.node_dir(node).mkdir(mode=0o700)
        add_namespace(spec.netns_name(node), (*NO_DAD, *_FORWARD))
        with Netns.open(NETNS_DIR / spec.netns_name(node)) as target:
            configure(spec.lan, partial(_plug, node, target.fd))
        configure(spec.netns_name(node), partial(_address, spec, node))


def down(prefix: str) -> None:
    """Removes pins, namespaces, mounts and files of the lab, even if it is incomplete or missing.

    Processes must end before: a running one keeps its namespace alive, without a name.
    """
    for path in pins(prefix):
        bpffs.remove_tree(path)
    for name in namespaces(prefix):
        # `ip netns del` refuses a file if `ip netns add` was interrupted before mounting it.
        unpin(NETNS_DIR / name)
    run_dir = Path("/run", prefix)
    for mount in sorted(_mounts_below(run_dir), reverse=True):
        if mount.is_dir():
            run(["umount", "--lazy", str(mount)], check=False)
        else:
            unpin(mount)
    shutil.rmtree(run_dir, ignore_errors=True)
    if run_dir.exists():
        raise SluiceError(f"cannot remove {run_dir}")


def namespaces(prefix: str) -> list[str]:
    """Returns the names of the lab's network namespaces, the segment's included."""
    return sorted(path.name for path in NETNS_DIR.glob(f"{prefix}-*"))


def pins(prefix: str) -> list[Path]:
    """Returns the pin directories of the lab's agents.

    The bpf file system that an agent mounted stays: another program may use it by now.
    """
    return sorted(BPFFS.glob(f"{prefix}-*"))


def processes_inside(names: Iterable[str]) -> list[int]:
    """Returns the pids of all processes in these namespaces, except this one."""
    wanted = set()
    for name in names:
        with contextlib.suppress(OSError):
            status = (NETNS_DIR / name).stat()
            wanted.add((status.st_dev, status.st_ino))
    pids = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):  # it ended meanwhile
            status = Path(f"/proc/{pid}/ns/net").stat()
            if (status.st_dev, status.st_ino) in wanted and pid != os.getpid():
                pids.append(pid)
    return pids


def add_namespace(name: str, sysctls: Iterable[str]) -> None:
    """Makes a named namespace with loopback up, and kernel settings that hold before any interface comes.

    Raises SluiceError.
    """
    from pyroute2 import netns

    try:
        netns.create(name)
    except OSError as error:
        raise SluiceError(f"{NETNS_DIR / name}: {error.strerror}") from None
    run(["sysctl", "-q", "-w", *sysctls], netns=NETNS_DIR / name)
    configure(name, lambda route: route.link("set", index=LOOPBACK_INDEX, state="up"))


def configure(name: str, change: Callable[[IPRoute], object]) -> None:
    """Calls `change` with an rtnetlink socket of the namespace. Raises SluiceError."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    def inside() -> None:
        with IPRoute() as route:
            change(route)

    try:
        with Netns.open(NETNS_DIR / name) as target:
            target.call(inside)
    except NetlinkError as error:
        raise SluiceError(f"rtnetlink in {name}: {error.args[1]}") from error


def remove_namespace(name: str) -> None:
    if (NETNS_DIR / name).exists():
        unpin(NETNS_DIR / name)


def _bridge(route: IPRoute) -> None:
    route.link("add", ifname=_BRIDGE, kind="bridge", br_mcast_snooping=0, state="up")


def _plug(node: str, netns_fd: int, route: IPRoute) -> None:
    """Connects the node's eth0 to the bridge."""
    route.link("add", ifname=node, kind="veth", peer={"ifname": "eth0", "net_ns_fd": netns_fd})
    route.link("set", index=_index(route, node), master=_index(route, _BRIDGE), state="up")


def _address(spec: LabSpec, node: str, route: IPRoute) -> None:
    """Gives the node its addresses, and its routes to the other nodes' pods."""
    index = _index(route, "eth0")
    route.link("set", index=index, state="up")
    for address, length in zip(spec.underlay(node), (24, 64), strict=True):
        route.addr("add", index=index, address=address, prefixlen=length)
    _route_pods(spec, [other for other in spec.nodes if other != node], "add", route)


def _route_pods(spec: LabSpec, to: Iterable[str], command: str, route: IPRoute) -> None:
    """Adds or removes (`del`) the routes to the pods of other nodes."""
    for node in to:
        for cidr, gateway in zip(spec.pod_cidrs(node), spec.underlay(node), strict=True):
            route.route(command, dst=cidr, gateway=gateway)


def divide(spec: LabSpec) -> None:
    """Makes the pods of each node a network of their own, without a route to the others, until `unite`."""
    for node in spec.nodes:
        others = [other for other in spec.nodes if other != node]
        configure(spec.netns_name(node), partial(_route_pods, spec, others, "del"))


def unite(spec: LabSpec) -> None:
    """Takes back `divide`."""
    for node in spec.nodes:
        others = [other for other in spec.nodes if other != node]
        configure(spec.netns_name(node), partial(_route_pods, spec, others, "add"))


def add_gateway(spec: LabSpec, name: str, ipv4: str) -> None:
    """Makes a namespace on the segment, with routes to the pods of all nodes. Raises SluiceError."""
    add_namespace(spec.netns_name(name), NO_DAD)
    with Netns.open(NETNS_DIR / spec.netns_name(name)) as target:
        configure(spec.lan, partial(_plug, name, target.fd))

    def address(route: IPRoute) -> None:
        index = _index(route, "eth0")
        route.link("set", index=index, state="up")
        route.addr("add", index=index, address=ipv4, prefixlen=24)
        for node in spec.nodes:
            route.route("add", dst=spec.pod_cidrs(node)[0], gateway=spec.underlay(node)[0])

    configure(spec.netns_name(name), address)


def _index(route: IPRoute, name: str) -> int:
    index: int = route.link_lookup(ifname=name)[0]
    return index


def _mounts_below(directory: Path) -> list[Path]:
    points = (Path(one.mountpoint) for one in psutil.disk_partitions(all=True))
    return [point for point in points if directory in point.parents]
