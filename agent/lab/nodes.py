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
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from agent.core.errors import SluiceError
from agent.kernel.bpf import bpffs
from agent.kernel.exec import run
from agent.kernel.netns import unpin
from agent.lab.lab_spec import BPFFS, LabSpec
from agent.lab.links import FORWARD, NETNS_DIR, NO_DAD, Port, add_namespace, join, links, remove_namespace

_BRIDGE = "br0"


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
    with links(spec.lan) as segment:
        segment.bridge(_BRIDGE)
    for node in spec.nodes:
        spec.node_dir(node).mkdir(mode=0o700)
        ipv4, ipv6 = spec.underlay(node)
        _plug(spec, node, {**NO_DAD, **FORWARD}, f"{ipv4}/24", f"{ipv6}/64")
        _route_pods(spec, node, "add")


def down(prefix: str) -> None:
    """Removes pins, namespaces, mounts and files of the lab, even if it is incomplete or missing.

    Processes must end before: a running one keeps its namespace alive, without a name.
    """
    for path in pins(prefix):
        bpffs.remove_tree(path)
    for name in namespaces(prefix):
        remove_namespace(name)
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


def divide(spec: LabSpec) -> None:
    """Makes the pods of each node a network of their own, without a route to the others, until `unite`."""
    for node in spec.nodes:
        _route_pods(spec, node, "del")


def unite(spec: LabSpec) -> None:
    """Takes back `divide`."""
    for node in spec.nodes:
        _route_pods(spec, node, "add")


def add_gateway(spec: LabSpec, name: str, ipv4: str) -> None:
    """Makes a namespace on the segment, with routes to the pods of all nodes. Raises SluiceError."""
    _plug(spec, name, NO_DAD, f"{ipv4}/24")
    with links(spec.netns_name(name)) as gateway:
        for node in spec.nodes:
            gateway.add_route(spec.pod_cidrs(node)[0], spec.underlay(node)[0])


def _plug(spec: LabSpec, name: str, sysctls: Mapping[str, int], *addresses: str) -> None:
    """Makes a namespace with an eth0 on the segment."""
    add_namespace(spec.netns_name(name), sysctls)
    join(Port(spec.lan, name), Port(spec.netns_name(name), "eth0", addresses))
    with links(spec.lan) as segment:
        segment.up(name, master=_BRIDGE)


def _route_pods(spec: LabSpec, node: str, command: str) -> None:
    """Adds or removes (`del`) the node's routes to the pods of the others."""
    with links(spec.netns_name(node)) as inside:
        for other in spec.nodes:
            if other != node:
                for cidr, gateway in zip(spec.pod_cidrs(other), spec.underlay(other), strict=True):
                    inside.rtnl.route(command, dst=cidr, gateway=gateway)


def _mounts_below(directory: Path) -> list[Path]:
    points = (Path(one.mountpoint) for one in psutil.disk_partitions(all=True))
    return [point for point in points if directory in point.parents]
