# SPDX-License-Identifier: Apache-2.0
"""Facts of one node as values: collected by agent.diagnosis.probes, judged by agent.diagnosis.checks. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from agent.backends.kernel_features import Feature
from agent.core.model.host import HostView, InKernel
from agent.core.settings import Settings
from agent.install.planning import InstallPlan, View

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """The agent's answers: `status`, `pods` and `verify` are those of its API, `losses` of its account.

    `pid` is 0 if its process is not visible; then there are no figures.
    """

    status: Row
    _: KW_ONLY
    pods: tuple[Row, ...] = ()
    verify: tuple[Row, ...] = ()
    losses: Mapping[str, int] = field(default_factory=dict)
    pid: int = 0
    resident: int = 0  # bytes
    descriptors: int = 0
    most_descriptors: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """The content of the agent's directories, with or without an agent. `why` it does not answer, "" if it does.

    `backend` is that of backend_record.Recorded, "" without a record; `noted` counts pods that were captured.
    """

    why: str = ""
    backend: str = ""
    release: str = ""
    damaged: tuple[str, ...] = ()
    noted: int = 0
    zds: str = ""  # "" no file, "socket", or what it is instead


@dataclass(frozen=True, slots=True)
class Listed:
    """A file of the runtime's directory: the types of its plugins in order, () if a runtime would reject it."""

    name: str
    types: tuple[str, ...]
    ours: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cni:
    """The CNI installation. `managed`: own, insert or off.

    `plugin`: "" if right, else what is wrong with the binary; `runs`: why it cannot run. `watched`: whether the
    runtime's notification queue holds the present directory; None if unknown.
    """

    managed: str
    directory: str
    directory_reason: str
    plugins: str
    plugins_reason: str
    files: tuple[Listed, ...] = ()
    view: View = field(default_factory=View)
    verdict: InstallPlan = field(default_factory=InstallPlan)
    error: str = ""
    plugin: str = ""
    runs: str = ""
    runtime: str = ""
    watched: bool | None = None
    istio: str = ""  # where istio-cni's agent was met, "" for nowhere


@dataclass(frozen=True, slots=True)
class PodFacts:
    """One pod's network namespace. `ours` are layers with rules of Sluice, `others` those of other mesh agents.

    `ports` of listeners lie in `range`, from which the kernel takes ports of outgoing connections.
    """

    name: str
    origin: str
    _: KW_ONLY
    captured: bool
    ours: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    sidecar: bool = False
    foreign: tuple[str, ...] = ()
    silent: tuple[int, ...] = ()
    ipv6: bool = True
    loopback4: bool = True
    loopback6: bool = True
    addresses: tuple[str, ...] = ()
    range: tuple[int, int] = (32768, 60999)
    ports: tuple[int, ...] = ()
    states: Mapping[str, int] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, slots=True)
class PodsFacts:
    """Pods with a note; on a whole node (not a lab's) also other namespaces with rules."""

    noted: tuple[PodFacts, ...] = ()
    others: tuple[PodFacts, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """The node's own namespace.

    `probes`: the mechanisms of its probe exemption; `pod_rules`: chains there that belong in pods. `port`: the process
    that listens on the metrics port, "" for none; `port_ours`: it is the agent.
    """

    view: HostView
    _: KW_ONLY
    probes: tuple[str, ...] = ()
    pod_rules: tuple[str, ...] = ()
    port: str = ""
    port_ours: bool = False


@dataclass(frozen=True, slots=True)
class Preflight:
    """The result of the trials. `selftest`: failures, () for none.

    `choice` is "" if no backend works, and `reason` says why.
    """

    choice: str
    reason: str
    features: tuple[Feature, ...] = ()
    selftest: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttachedProgram:
    """A foreign program on the root cgroup."""

    hook: str
    name: str
    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """The node. `programs`: name and pid of programs that matter to Sluice; `firewalls` are enabled in files.

    `sysctls` by name with dots, without those that the kernel lacks. `cilium` are keys of its configuration.
    """

    whole: bool = True
    ipv6_off: bool = False
    programs: Mapping[str, int] = field(default_factory=dict)
    firewalls: tuple[str, ...] = ()
    sysctls: Mapping[str, str] = field(default_factory=dict)
    cilium: Mapping[str, str] = field(default_factory=dict)
    felix_bpf: bool = False
    inotify: str = ""  # why no queue of events could be made
    inotify_used: int = 0
    shims: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """SELinux and AppArmor. `denials`: lines of the kernel.

    `selinux`: "", permissive or enforcing; `context` of the agent, or of this process.
    """

    selinux: str = ""
    apparmor: bool = False
    context: str = ""
    denials: tuple[str, ...] = ()
    unread: str = ""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """All groups by name. `unseen` has the reason for each group that could not be read; ignore its value."""

    settings: Settings = field(default_factory=Settings)
    source: str = ""  # where the settings are from
    _: KW_ONLY
    agent: AgentFacts = field(default_factory=lambda: AgentFacts({}))
    left: Left = field(default_factory=Left)
    cni: Cni = field(
        default_factory=lambda: Cni(managed="off", directory="", directory_reason="", plugins="", plugins_reason="")
    )
    pods: PodsFacts = field(default_factory=PodsFacts)
    host: NetworkFacts = field(
        default_factory=lambda: NetworkFacts(
            HostView(release="", ipv6=True, nf_tables=InKernel.UNKNOWN, nft=(), legacy=())
        )
    )
    preflight: Preflight = field(default_factory=lambda: Preflight("", ""))
    sockets: tuple[AttachedProgram, ...] = ()
    node: HostFacts = field(default_factory=HostFacts)
    security: Security = field(default_factory=Security)
    unseen: Mapping[str, str] = field(default_factory=dict)
