# SPDX-License-Identifier: Apache-2.0
"""Probes the other programs of the node, BPF programs included, its kernel settings, and features as preflight does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from agent.backends.choose import LAYERS, choose
from agent.backends.ebpf.object_files import NODE, RESERVE
from agent.backends.ebpf.pins import Pins
from agent.backends.trials import KernelTrials
from agent.core.errors import KernelError, SettingsError
from agent.core.settings import Settings
from agent.diagnosis.node_facts import AttachedProgram, HostFacts, Preflight
from agent.diagnosis.probes import inotify_queues, read
from agent.install.host_root import HostRoot
from agent.kernel import host_view
from agent.kernel.bpf import bpffs, query
from agent.kernel.bpf.syscall import AttachType
from agent.kernel.inotify import Inotify
from agent.sources.state import backend_record

_PROGRAMS = frozenset(
    ("firewalld", "kube-router", "cilium-agent", "calico-node", "kindnetd", "aws-k8s-agent", "flanneld", "install-cni")
)
_SHIMS = ("containerd-shim-runsc", "containerd-shim-kata", "runsc-sandbox", "runsc")
_SYSCTLS = (
    "fs.inotify.max_user_instances",
    "fs.inotify.max_user_watches",
    "net.ipv4.conf.all.rp_filter",
    "net.ipv4.conf.default.rp_filter",
    "net.ipv4.ip_forward",
    "net.ipv6.conf.all.disable_ipv6",
    "net.bridge.bridge-nf-call-iptables",
    "net.netfilter.nf_conntrack_count",
    "net.netfilter.nf_conntrack_max",
)
_CILIUM = "root/tmp/cilium/config-map"  # where its agent mounts its ConfigMap, a file per key
_KEYS = ("kube-proxy-replacement", "bpf-lb-sock", "bpf-lb-sock-hostns-only", "enable-bpf-masquerade", "cni-exclusive")


def whole(proc: Path = Path("/proc")) -> bool:
    """Returns whether this is process 1's network namespace: a lab's node shares the machine with others."""
    try:
        return (proc / "1/ns/net").stat().st_ino == (proc / "self/ns/net").stat().st_ino
    except OSError:
        return False


def probe(settings: Settings, proc: Path = Path("/proc")) -> HostFacts:
    """Reads the node. Raises OSError without /proc."""
    programs, shims = _running(proc)
    cilium, calico = programs.get("cilium-agent"), programs.get("calico-node")
    inotify = _inotify()
    return HostFacts(
        whole=whole(proc),
        ipv6_off="ipv6.disable=1" in (proc / "cmdline").read_text().split(),
        programs=programs,
        firewalls=tuple(_firewalls(programs, HostRoot(settings.host_root))),
        sysctls={name: value for name in _SYSCTLS if (value := read(proc / "sys" / name.replace(".", "/")))},
        cilium={key: value for key in _KEYS if cilium and (value := read(proc / str(cilium) / _CILIUM / key))},
        felix_bpf=bool(calico) and "FELIX_BPFENABLED=true" in read(proc / str(calico) / "environ"),
        inotify=inotify,
        inotify_used=_queues(proc),
        shims=shims,
    )


def _running(proc: Path) -> tuple[Mapping[str, int], tuple[str, ...]]:
    programs = dict[str, int]()
    shims = dict[str, None]()
    for path in proc.glob("[0-9]*"):
        word = read(path / "comm")
        if word in _PROGRAMS:
            programs.setdefault(word, int(path.name))
        elif word.startswith(("containerd-shim", "runsc")):  # cut to 15 characters
            command = read(path / "cmdline").split("\0")[0].rpartition("/")[2]
            shims |= dict.fromkeys([command] if command.startswith(_SHIMS) else [])
    return programs, tuple(sorted(shims))


def _firewalls(programs: Iterable[str], host: HostRoot) -> Iterable[str]:
    yield from (name for name in ("firewalld", "kube-router") if name in programs)
    if "enabled=yes" in read(host.path("/etc/ufw/ufw.conf")).lower().split():
        yield "ufw"
    with contextlib.suppress(OSError):
        if (host.path("/etc/systemd/system/sysinit.target.wants") / "nftables.service").is_symlink():
            yield "nftables"


def _inotify() -> str:
    try:
        Inotify().close()
    except KernelError as error:
        return str(error)
    return ""


def _queues(proc: Path) -> int:
    """Counts the queues of root's processes: the limit is per user."""
    count = 0
    for path in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if path.stat().st_uid == 0:
                count += len(inotify_queues(path))
    return count


# Hook as it is shown -> the kernel's.
_HOOKS = {
    "connect4": AttachType.CGROUP_INET4_CONNECT,
    "connect6": AttachType.CGROUP_INET6_CONNECT,
    "sendmsg4": AttachType.CGROUP_UDP4_SENDMSG,
    "sendmsg6": AttachType.CGROUP_UDP6_SENDMSG,
    "recvmsg4": AttachType.CGROUP_UDP4_RECVMSG,
    "recvmsg6": AttachType.CGROUP_UDP6_RECVMSG,
    "getpeername4": AttachType.CGROUP_INET4_GETPEERNAME,
    "getpeername6": AttachType.CGROUP_INET6_GETPEERNAME,
}
_OURS = {(program.name, program.attach) for program in (*NODE, *RESERVE)}


def foreign_programs(cgroup: str = "") -> tuple[AttachedProgram, ...]:
    """Reads the root of the hierarchy, or that cgroup; Sluice's are known by name. Raises KernelError."""
    path = Path(cgroup) if cgroup else bpffs.cgroup_root()
    return tuple(
        AttachedProgram(word, one.name, one.id)
        for word, hook in _HOOKS.items()
        for one in query.attached(path, hook)
        if (one.name, hook) not in _OURS
    )


def preflight(settings: Settings, used: str) -> Preflight:
    """Tries the kernel's features, for the choice in use or the one that would be made. Raises SluiceError.

    Creates temporary network namespaces; loads modules as programming a pod would.
    """
    tried = KernelTrials(Pins.of(settings.bpf_dir), ipv6=settings.ipv6)
    if used in LAYERS:
        layers = [tried.backends[name] for name in LAYERS[used]]
        missing = [f"{one.name}: {support.missing}" for one in layers if not (support := one.probe()).ok]
        failed = missing or tried.test(layers)
        return Preflight(used, "in use", tried.features(used), tuple(failed))
    view = host_view.read_host_view()
    old = backend_record.load(settings.run_dir)
    try:
        choice = choose(settings.backend, tried.backends, tried.trials, view, old)
    except SettingsError as error:
        return Preflight("", str(error))
    return Preflight(choice.name, choice.reason, tried.features(choice.name))
