# SPDX-License-Identifier: Apache-2.0
"""The contents of a support bundle: answers of the agent, state of the kernel, files."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from agent import __version__
from agent.backends.hostprobes import former, former_reading, nft_rendering
from agent.core.errors import SluiceError
from agent.core.model.sockets import TcpSocket, TcpState
from agent.core.model.sockets import text as endpoint
from agent.core.text import table
from agent.core.wire.tcp_info import TcpReport
from agent.diagnosis import network
from agent.diagnosis.bundle import MOST, Bundle, safe
from agent.diagnosis.node_facts import NodeFacts
from agent.install.host_root import HostRoot
from agent.kernel import exec, xtables
from agent.kernel.admin_socket import ask
from agent.kernel.bpf import bpffs
from agent.kernel.bpf import query as bpfquery
from agent.kernel.bpf.syscall import AttachType
from agent.kernel.netlink.ipset import IpsetSocket
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.netns import Netns
from agent.sources.netns import existing
from agent.sources.state import history_file

_RECORDS = "500"
_FILES = ("/proc/version", "/proc/cmdline", "/proc/modules", "/proc/meminfo", "/proc/mounts")
# In a pod, by the file's name. deploy/image/layout puts these programs into the image.
IN_POD: Mapping[str, Sequence[str]] = {
    "nft": ("nft", "-s", "list", "ruleset"),
    "iptables-legacy": ("iptables-legacy-save",),
    "ip6tables-legacy": ("ip6tables-legacy-save",),
}
_FORMER = ("-t", former_reading.TABLE, "-S", former_reading.CHAIN)
# Of the host only Sluice's rules, by the mechanism that made them: its other tables are foreign, and a program of the
# other variant would create tables.
EXEMPTION: Mapping[str, Sequence[Sequence[str]]] = {
    "nftables": (("nft", "-s", "list", "table", "inet", nft_rendering.TABLE),),
    "iptables": tuple((f"{program}-nft", *_FORMER) for program in ("iptables", "ip6tables")),
    "iptables-legacy": tuple((f"{program}-legacy", *_FORMER) for program in ("iptables", "ip6tables")),
}
_NETWORK_IN_POD = ("rules", "rules6", "routes", "routes6", "addresses")
_NETWORK_ON_HOST = ("rules", "rules6", "addresses", "neighbours")
_SOCKETS = (
    *("STATE", "LOCAL", "REMOTE", "UID", "INODE", "COOKIE", "MARK"),
    *("UNREAD", "UNACKED", "SENT", "RECEIVED", "RETRANSMITS", "RTT µs"),
)
JOURNAL = ("journalctl", "-u", "sluice", "-u", "sluice-ztunnel", "-n", "5000", "--no-pager", "-o", "short-iso")
_LEGACY = {"iptables-legacy": 4, "ip6tables-legacy": 6}  # by family: the programs would create missing tables


def gather(bundle: Bundle, facts: NodeFacts, diagnosis: Any, findings: str, pod: str = "") -> None:
    """Fills the bundle. `pod`: only this pod. Missing parts are noted in the bundle; raises nothing."""
    bundle.value("doctor.json", diagnosis)
    bundle.text("doctor.txt", findings + "\n")
    bundle.value("settings.json", _settings(facts))
    bundle.value("preflight.json", asdict(facts.preflight))
    _node(bundle, facts)
    _try(bundle, "events.json", partial(_events, facts.settings.run_dir, pod))
    _agent(bundle, facts, pod)
    _cni(bundle, facts)
    _programs(bundle)
    for kind in _NETWORK_ON_HOST:
        _try(bundle, f"host/{kind}.txt", partial(network.show, kind))
    for argv in (argv for layer in facts.host.probes for argv in EXEMPTION.get(layer, ())):
        _command(bundle, f"host/{argv[0]}.txt", argv)
    if "ipset" in facts.host.probes:
        _try(bundle, "host/ipset.json", _sets)
    _pods(bundle, facts, pod)
    _log(bundle, facts)


def _settings(facts: NodeFacts) -> dict[str, Any]:
    values = {field.name: getattr(facts.settings, field.name) for field in fields(facts.settings)}
    return {"from": facts.source, "values": values}


def _node(bundle: Bundle, facts: NodeFacts) -> None:
    system = os.uname()
    versions = {"sluice": __version__, "python": sys.version, "kernel": f"{system.release} {system.version}"}
    bundle.value("versions.json", {**versions, "machine": system.machine, "platform": platform.platform()})
    bundle.value("node.json", asdict(facts.node))
    bundle.value("host/view.json", asdict(facts.host))
    for path in _FILES:
        _file(bundle, f"node/{safe(Path(path).name)}.txt", Path(path))
    with contextlib.suppress(OSError):
        # The node's, and not that of an image.
        _file(bundle, "node/os-release.txt", HostRoot("/proc/1/root").path("/etc/os-release"))


def _agent(bundle: Bundle, facts: NodeFacts, pod: str) -> None:
    if facts.left.why:
        bundle.lacks("agent/", facts.left.why)
        return
    run_dir = facts.settings.run_dir
    bundle.value("agent/status.json", facts.agent.status)
    chosen = [row for row in facts.agent.pods if not pod or pod in _titles(row)]
    if pod and not chosen:
        bundle.lacks(f"pods/{safe(pod)}", f"no pod {pod!r} on this node")
    bundle.value("agent/pods.json", chosen if pod else list(facts.agent.pods))
    bundle.value("agent/verify.json", list(facts.agent.verify))
    query = {"limit": _RECORDS, **({"pod": pod} if pod else {})}
    _try(bundle, "agent/connections.json", partial(ask, run_dir, "/v1/connections", **query))
    for row in chosen:
        name = f"pods/{safe(row['namespace'])}_{safe(row['name'])}"
        _try(bundle, f"{name}/explain.json", partial(ask, run_dir, "/v1/explain", pod=row["uid"]))


def _events(run_dir: str, pod: str) -> list[dict[str, Any]]:
    """Lists the history; with `pod` the events of it and of the node. Works without an agent. Raises SluiceError."""
    try:
        events = history_file.read(run_dir)
    except OSError as error:
        raise SluiceError(f"{history_file.path(run_dir)}: {error.strerror}") from None
    return [one.as_dict() for one in events if not (pod and one.pod) or pod in (one.pod, f"{one.namespace}/{one.pod}")]


def _titles(row: Mapping[str, Any]) -> tuple[str, ...]:
    return f"{row['namespace']}/{row['name']}", row["name"], row["uid"]


def _try(bundle: Bundle, name: str, asked: Callable[[], Any]) -> None:
    """Adds the result as text if it is text, else as JSON."""
    try:
        content = asked()
        (bundle.text if isinstance(content, str) else bundle.value)(name, content)
    except SluiceError as error:
        bundle.lacks(name, str(error))


def _cni(bundle: Bundle, facts: NodeFacts) -> None:
    for name, data in facts.cni.view.files.items():
        try:
            bundle.value(f"cni/{safe(name)}", json.loads(data))
        except (ValueError, RecursionError):
            bundle.text(f"cni/{safe(name)}", data.decode(errors="replace"))
    for name, why in facts.cni.view.unread.items():
        bundle.lacks(f"cni/{safe(name)}", why)
    if "cni" in facts.unseen:
        bundle.lacks("cni/", facts.unseen["cni"])


def _programs(bundle: Bundle) -> None:
    """Lists BPF programs on the root cgroup by hook, and all loaded ones."""
    try:
        root = bpffs.cgroup_root()
        hooks = [hook for hook in AttachType if hook.name.startswith("CGROUP")]
        on_root = {hook.name.lower(): [asdict(one) for one in bpfquery.attached(root, hook)] for hook in hooks}
        bundle.value("bpf.json", {"root_cgroup": on_root, "programs": [asdict(one) for one in bpfquery.programs()]})
    except SluiceError as error:
        bundle.lacks("bpf.json", str(error))


def _pods(bundle: Bundle, facts: NodeFacts, pod: str) -> None:
    """Adds the namespaces of captured pods, from the notes on disk: works without an agent."""
    run_dir = facts.settings.run_dir
    known = existing.known(run_dir)
    for one in known:
        if not one.captured or (pod and pod not in (one.name, one.uid, one.name.partition("/")[2])):
            continue
        name = f"pods/{safe(one.name.partition('/')[0])}_{safe(one.name.partition('/')[2] or one.uid)}"
        _file(bundle, f"{name}/note.json", Path(run_dir, "pods", f"{one.uid}.json"), structured=True)
        paths = [Path(run_dir, "netns", one.uid), *([Path(one.path)] if one.path else [])]
        problems = list[str]()
        netns = next(iter(existing.namespaces(paths, problems)), None)
        if netns is None:
            bundle.lacks(f"{name}/", "; ".join(problems) or "its network namespace is not there")
            continue
        with contextlib.closing(netns):
            for title, argv in IN_POD.items():
                if title == "nft" and facts.host.view.nft is None:
                    bundle.lacks(f"{name}/{title}.txt", f"nf_tables: {facts.host.view.nf_tables.value}")
                elif title not in _LEGACY or netns.call(partial(xtables.listed, _LEGACY[title])):
                    _command(bundle, f"{name}/{title}.txt", argv, netns)
            for kind in _NETWORK_IN_POD:
                _try(bundle, f"{name}/{kind}.txt", partial(netns.call, partial(network.show, kind)))
            _try(bundle, f"{name}/sockets.txt", partial(_sockets, netns))


def _sets() -> list[dict[str, Any]]:
    with contextlib.closing(IpsetSocket()) as ipset:
        return [asdict(one) for one in former.former_sets(ipset)]


def _sockets(netns: Netns) -> str:
    """Lists TCP sockets as the account reads them. Those in TIME_WAIT have no counts. Raises SluiceError."""
    with contextlib.closing(netns.call(SockDiag)) as diag:
        counted = {one.socket.cookie: one for one in diag.reports(TcpState)[0]}
        rows = [_socket(one, counted.get(one.cookie)) for one in diag.both()]
    return table(_SOCKETS, rows) + "\n"


def _socket(one: TcpSocket, counted: TcpReport | None) -> tuple[object, ...]:
    mark = f"{one.mark:#x}" if one.mark else ""
    names = one.state.name, endpoint(one.local), endpoint(one.remote), one.uid, one.inode, one.cookie, mark
    if counted is None:
        return (*names, *[""] * (len(_SOCKETS) - len(names)))
    info = counted.info
    return (*names, counted.unread, counted.unacked, info.sent, info.received, info.retransmitted, info.rtt)


def _log(bundle: Bundle, facts: NodeFacts) -> None:
    """Adds the agent's output if it is a file, else the journal's."""
    written = Path("/proc", str(facts.agent.pid), "fd/2")
    if facts.agent.pid and written.is_file():
        _file(bundle, "agent/log.txt", written)
        return
    if shutil.which(JOURNAL[0], path=exec.PATH) is None:
        bundle.lacks(
            "agent/log.txt", f"not in a file, and no {JOURNAL[0]} here; kubectl logs of the agent's pod shows it"
        )
    else:
        _command(bundle, "agent/log.txt", JOURNAL)


def _command(bundle: Bundle, name: str, argv: Sequence[str], within: Netns | None = None) -> None:
    try:
        done = exec.run(argv, within=within, check=False, seconds=20)
    except SluiceError as error:
        bundle.lacks(name, str(error))
        return
    if done.returncode and not done.stdout:
        why = next(filter(str.strip, done.stderr.splitlines()), f"exit {done.returncode}")
        bundle.lacks(name, f"{' '.join(argv)}: {why}")
    else:
        bundle.text(name, f"# {' '.join(argv)}\n{done.stdout}")


def _file(bundle: Bundle, name: str, path: Path, *, structured: bool = False) -> None:
    """Adds a file; only the end of a long one."""
    try:
        with path.open("rb") as file:
            with contextlib.suppress(OSError):  # files of /proc have no end to go to
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2 * MOST))
            content = file.read(4 * MOST).decode(errors="replace")
        if structured:
            with contextlib.suppress(ValueError):
                bundle.value(name, json.loads(content))
                return
        bundle.text(name, content)
    except OSError as error:
        bundle.lacks(name, f"{path}: {error.strerror}")
