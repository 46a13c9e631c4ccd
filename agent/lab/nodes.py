"""Nodes as network namespaces on one segment: `up` makes them, `down` removes whatever carries the prefix.

    <prefix>-lan: br0 ── node1 ══ eth0 :<prefix>-node1 ── veth of each pod (made by the CNI plugin)
                      └─ node2 ══ eth0 :<prefix>-node2

Every interface is created inside its namespace, so names never meet those of the host or of another lab.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from agent.core.errors import CommandError, SluiceError
from agent.kernel.bpf import bpffs
from agent.kernel.exec import run
from agent.kernel.netns import unpin
from agent.lab.topology import BPFFS, LabSpec

NETNS_DIR = Path("/run/netns")

# Without duplicate address detection an IPv6 address is usable at once: the lab's addresses cannot clash.
NO_DAD = ("net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0")
_FORWARD = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")


def claim(spec: LabSpec) -> None:
    """Makes /run/<prefix>: of two who build the same lab at once, one is refused, and must not clean up."""
    refused = SluiceError(f"lab {spec.prefix} is already there; first: sluice lab down --prefix {spec.prefix}")
    if namespaces(spec.prefix) or pins(spec.prefix):
        raise refused
    try:
        spec.run_dir.mkdir(mode=0o700)
    except FileExistsError:
        raise refused from None


def up(spec: LabSpec) -> None:
    """Makes segment and nodes, all routes included, after `claim`. Raises CommandError; then call `down`."""
    add_namespace(spec.lan, NO_DAD)
    _ip(spec.lan, ["link add br0 type bridge mcast_snooping 0", "link set br0 up"])
    for node in spec.nodes:
        spec.node_dir(node).mkdir(mode=0o700)
        add_namespace(spec.netns_name(node), (*NO_DAD, *_FORWARD))
        _ip(
            spec.lan,
            [
                f"link add {node} type veth peer name eth0 netns {spec.netns_name(node)}",
                f"link set {node} master br0 up",
            ],
        )
        _ip(spec.netns_name(node), _node_commands(spec, node))


def down(prefix: str) -> None:
    """Removes pins, namespaces, mounts and files of the lab, also of one that was half made; nothing there is fine.

    Processes are to be ended before: one that lives keeps its namespace alive, without a name.
    """
    for path in pins(prefix):
        bpffs.remove_tree(path)
    for name in namespaces(prefix):
        # A file that `ip netns add` was interrupted before mounting is refused by `ip netns del`.
        unpin(NETNS_DIR / name)
    run_dir = Path("/run", prefix)
    for mount in sorted(_mounts_below(run_dir), reverse=True):
        if mount.is_dir():
            run(["umount", "--lazy", str(mount)], check=False)
        else:
            unpin(mount)
    shutil.rmtree(run_dir, ignore_errors=True)
    if run_dir.exists():
        raise SluiceError(f"{run_dir}: could not be removed")


def namespaces(prefix: str) -> list[str]:
    """Names of the lab's network namespaces, the segment's included."""
    return sorted(path.name for path in NETNS_DIR.glob(f"{prefix}-*"))


def pins(prefix: str) -> list[Path]:
    """Directories of what the lab's agents keep in the kernel. The file system that an agent mounted for it stays:
    somebody else may have begun to use it."""
    return sorted(BPFFS.glob(f"{prefix}-*"))


def processes_inside(names: Iterable[str]) -> list[int]:
    """Pids of all processes that live in one of these namespaces, ourselves excepted."""
    wanted = set()
    for name in names:
        with contextlib.suppress(OSError):
            status = (NETNS_DIR / name).stat()
            wanted.add((status.st_dev, status.st_ino))
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            status = (entry / "ns/net").stat()
            if (status.st_dev, status.st_ino) in wanted:
                found.append(int(entry.name))
    return found


def add_namespace(name: str, sysctls: Iterable[str]) -> None:
    """A named namespace with loopback up, and kernel settings that hold before any interface comes."""
    run(["ip", "netns", "add", name])
    run(["sysctl", "-q", "-w", *sysctls], netns=NETNS_DIR / name)
    _ip(name, ["link set lo up"])


def remove_namespace(name: str) -> None:
    if (NETNS_DIR / name).exists():
        unpin(NETNS_DIR / name)


def _node_commands(spec: LabSpec, node: str) -> list[str]:
    ipv4, ipv6 = spec.underlay(node)
    commands = [
        "link set eth0 up",
        f"address add {ipv4}/24 dev eth0",
        f"address add {ipv6}/64 dev eth0",
    ]
    for other in spec.nodes:
        if other != node:
            pairs = zip(spec.pod_cidrs(other), spec.underlay(other), strict=True)
            commands += [f"route add {cidr} via {gateway}" for cidr, gateway in pairs]
    return commands


def _ip(netns: str, commands: list[str]) -> None:
    try:
        run(["ip", "-n", netns, "-batch", "-"], stdin="\n".join(commands) + "\n")
    except CommandError as error:
        raise CommandError(f"in {netns}: {error}; commands were: {'; '.join(commands)}") from None


def _mounts_below(directory: Path) -> list[Path]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [Path(line.split()[4].replace("\\040", " ")) for line in lines]
    return [point for point in points if directory in point.parents]
