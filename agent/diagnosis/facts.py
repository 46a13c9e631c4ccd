"""What one node shows of itself, as values: read by agent.diagnosis.probes, judged by agent.diagnosis.checks. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.backends.preflight import Feature
from agent.core.model.host import HostView, InKernel
from agent.core.settings import Settings
from agent.install.planning import InstallPlan, View

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """The agent as it answers: `status`, `pods` and `verify` are those of its API, `losses` of its account.

    `pid` is 0 where its process cannot be seen; then the figures are of nobody.
    """

    status: Row
    pods: tuple[Row, ...] = ()
    verify: tuple[Row, ...] = ()
    losses: Mapping[str, int] = field(default_factory=dict)
    pid: int = 0
    resident: int = 0  # bytes
    descriptors: int = 0
    most_descriptors: int = 0


@dataclass(frozen=True, slots=True)
class Left:
    """What stands in the agent's directories whether it runs or not. `why`: why it does not answer, "" when it does.

    `backend` is recorded.Recorded's, "" without a record; `noted` counts pods that were captured.
    """

    why: str = ""
    backend: str = ""
    release: str = ""
    damaged: tuple[str, ...] = ()
    noted: int = 0
    zds: str = ""  # "" no file, "socket", or what it is instead


@dataclass(frozen=True, slots=True)
class Listed:
    """A file of the runtime's directory: its plugins' types in their order, () when a runtime would refuse it."""

    name: str
    types: tuple[str, ...]
    ours: bool = False


@dataclass(frozen=True, slots=True)
class Cni:
    """`managed`: own, insert or off. `plugin`: "" right, else why the binary is not; `runs`: why it cannot be run.

    `watched`: whether the runtime's notification queue holds the directory that is there now; None if that is unknown.
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
    """One pod's network namespace. `layers` hold rules in it: those of ours, then those of other mesh agents.

    `ports` of listeners lie in `range`, from which the kernel takes ports of outgoing connections.
    """

    name: str
    place: str
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
    """Those that are noted; and on a whole node (not in a lab's) others whose namespaces hold rules."""

    noted: tuple[PodFacts, ...] = ()
    others: tuple[PodFacts, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """The node's own namespace. `probes`: by whom its probe exemption is made, "" for nobody's; `pod_rules`: chains
    there that belong into pods. `port`: who listens on the metrics port, "" for nobody, and whether it is the agent."""

    view: HostView
    probes: tuple[str, ...] = ()
    pod_rules: tuple[str, ...] = ()
    port: str = ""
    port_ours: bool = False


@dataclass(frozen=True, slots=True)
class Preflight:
    """`choice` is "" when no backend can be used, and `reason` says why. `selftest`: what did not work, () all did."""

    choice: str
    reason: str
    features: tuple[Feature, ...] = ()
    selftest: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttachedProgram:
    """A program of somebody else's on the root cgroup."""

    hook: str
    name: str
    id: int


@dataclass(frozen=True, slots=True)
class HostFacts:
    """`programs`: name -> pid of programs that matter to us; `firewalls` are switched on in files.

    `sysctls` by name with dots; what the kernel does not have is left out. `cilium` are keys of its configuration.
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


@dataclass(frozen=True, slots=True)
class Security:
    """`selinux`: "", permissive or enforcing; `context` of the agent, or of us. `denials`: the kernel's lines."""

    selinux: str = ""
    apparmor: bool = False
    context: str = ""
    denials: tuple[str, ...] = ()
    unread: str = ""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """Groups by their names; of one that could not be read `unseen` has the reason, and its value says nothing."""

    settings: Settings = field(default_factory=Settings)
    source: str = ""  # where the settings are from
    agent: AgentFacts = field(default_factory=lambda: AgentFacts({}))
    left: Left = field(default_factory=Left)
    cni: Cni = field(default_factory=lambda: Cni("off", "", "", "", ""))
    pods: PodsFacts = field(default_factory=PodsFacts)
    host: NetworkFacts = field(default_factory=lambda: NetworkFacts(HostView("", True, InKernel.UNKNOWN, (), ())))
    preflight: Preflight = field(default_factory=lambda: Preflight("", ""))
    sockets: tuple[AttachedProgram, ...] = ()
    node: HostFacts = field(default_factory=HostFacts)
    security: Security = field(default_factory=Security)
    unseen: Mapping[str, str] = field(default_factory=dict)
