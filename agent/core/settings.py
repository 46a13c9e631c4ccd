# SPDX-License-Identifier: Apache-2.0
"""The agent's settings: one frozen value, from file, environment and flags, parsed once.

Each setting is declared once: its type, default, topic, kind of value and help. The command line, the documents and the
chart are generated from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import partial
from typing import Any

from agent.core import names
from agent.core.errors import SettingsError
from agent.core.policy.selectors import DEFAULT, Selector
from agent.core.setting_types import (
    API_SERVER,
    CONF_NAME,
    FILE,
    FLAG,
    HOST_PORT,
    LOG_FILE,
    OPTIONAL_DIRECTORY,
    PATH,
    SECONDS,
    TEXT,
    Address,
    Choice,
    Kind,
    List,
    Selectors,
    Whole,
    address,
    matching,
)

NODE = "The node and its parts"
PODS = "Which pods are captured"
CAPTURE = "How they are captured"
PROBES = "The node's probes"
KUBERNETES = "Kubernetes"
CNI = "The CNI plugin"
ACCOUNT = "Accounting and metrics"
TOPICS = (NODE, PODS, CAPTURE, PROBES, KUBERNETES, CNI, ACCOUNT)
BACKENDS = ("auto", "nftables", "iptables", "iptables-legacy", "ebpf")
_POD_NAME = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?/[a-z0-9][-a-z0-9.]{0,252}\*?"
_MOST_ENTRIES = 1 << 24


@dataclass(frozen=True, slots=True)
class Setting:
    """Declaration of a setting. `followed`: the part of it that takes effect without a restart."""

    name: str
    default: Any
    _: KW_ONLY
    topic: str
    kind: Kind
    help: str
    followed: str = ""


def _setting(topic: str, default: Any, kind: Kind, help: str, *, followed: str = "") -> Any:
    return field(default=default, metadata={"topic": topic, "kind": kind, "help": help, "followed": followed})


_node, _pods, _capture, _probes, _kubernetes, _cni, _account = (partial(_setting, topic) for topic in TOPICS)


def _map_size(word: str) -> str:
    """Parses MAP=ENTRIES for a map of names.BPF_MAPS. Raises ValueError."""
    name, sign, number = word.partition("=")
    if not sign or name not in names.BPF_MAPS or not number.isdecimal() or not 1 <= int(number) <= _MOST_ENTRIES:
        raise ValueError(f"a list of MAP=ENTRIES (1 to {_MOST_ENTRIES}) with MAP of {', '.join(names.BPF_MAPS)}")
    return f"{name}={int(number)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting with its default."""

    node_name: str = _node("", TEXT, "name of this node in logs and metrics (default: the host's name)")
    run_dir: str = _node(names.RUN_DIR, PATH, "directory of sockets, state and pinned namespaces")
    bpf_dir: str = _node(
        names.BPF_DIR,
        PATH,
        "bpffs directory for the pins of backend ebpf; run `sluice uncapture --all` before you change it",
    )
    bpf_sizes: tuple[str, ...] = _node(
        (),
        List(_map_size),
        "entries of newly created BPF maps, as in pods=4096,handover=65536; for records: bytes",
    )
    zds_socket: str = _node(names.ZDS_SOCKET, PATH, "unix socket to which ztunnel connects")
    ztunnel_ports: tuple[str, ...] = _node(
        ("15001", "15006", "15008"),
        List(lambda word: str(Whole(1, 65535).parse(word))),
        "ports on which ztunnel must listen in a captured pod (`sluice ztunnel`: 15001,15006)",
    )
    history_bytes: int = _node(
        1 << 20, Whole(1 << 16, 1 << 30), "size of the history of events in run_dir (`sluice events`)"
    )
    ack_seconds: float = _node(5.0, SECONDS, "seconds within which ztunnel must acknowledge a pod")
    log_level: str = _node("info", Choice(("debug", "info", "warning", "error")), "debug, info, warning or error")
    enablement_selectors: tuple[Selector, ...] = _pods(
        DEFAULT,
        Selectors(),
        "which pods are enrolled: list of {podSelector, namespaceSelector} (flag and environment: JSON)",
    )
    exclude_namespaces: tuple[str, ...] = _pods(("kube-system",), List(), "namespaces in which pods are never captured")
    exempt_pods: tuple[str, ...] = _pods(
        ("istio-system/ztunnel-*",),
        List(matching(_POD_NAME, "a list of NAMESPACE/NAME, where only NAME may end with *")),
        "NAMESPACE/NAME of pods never captured and started even without the agent; a trailing * matches a prefix",
    )
    own_namespace: str = _pods(
        "", TEXT, "namespace of the agent's own pods, which are never captured (in a pod: its own)"
    )
    unsupported_runtimes: tuple[str, ...] = _pods(
        ("gvisor",), List(), "runtime classes with a network stack of their own: their pods cannot be captured"
    )
    static_pods: str = _pods(
        "",
        FILE,
        "file of pods that no CNI call announces, or that this file enrols (YAML)",
        followed="the file is read again when it changes",
    )
    offline_pods: str = _pods(
        "by-namespace",
        Choice(("by-namespace", "refuse")),
        "pods that cannot be looked up while the API server or the agent is unavailable: by-namespace, or refuse",
    )
    startup_taint: str = _pods(
        "", TEXT, "taint that the agent removes from its node once no pod can start there uncaptured; empty for none"
    )
    startup_taint_returns: bool = _pods(False, FLAG, "put that taint back while pods could start uncaptured")
    startup_taint_stalled: bool = _pods(False, FLAG, "put that taint back while ztunnel does not accept connections")
    backend: str = _capture(
        "auto",
        Choice(BACKENDS),
        "auto, nftables, iptables (its nf_tables variant), iptables-legacy, or ebpf (falls back to auto)",
    )
    ipv6: bool = _capture(True, FLAG, "program IPv6 where a pod has it")
    dns_capture: bool = _capture(True, FLAG, "capture DNS, unless a pod's annotation says otherwise")
    dns_capture_to: str = _capture(
        "any",
        Choice(("any", "resolvers")),
        "any, or resolvers: capture DNS only towards the resolvers that the pod is configured with",
    )
    dns_resolvers: tuple[str, ...] = _capture(
        (), List(address), "resolvers of pods that have none known (dns_capture_to: resolvers)"
    )
    non_tcp: str = _capture(
        "count",
        Choice(("count", "refuse")),
        "action for a pod's traffic that is neither TCP nor captured DNS: count or refuse",
    )
    preserve_connections: bool = _capture(
        True, FLAG, "let connections that predate a pod's enrolment continue uncaptured"
    )
    sidecar_annotations: bool = _capture(
        False, FLAG, "honour the exclusions of traffic.sidecar.istio.io annotations too"
    )
    verify_seconds: float = _capture(30.0, SECONDS, "seconds between two verifications of a pod")
    add_seconds: float = _capture(
        18.0,
        SECONDS,  # Istio's ztunnel comes back within 15, the plugin gives up after 20
        "seconds that a CNI ADD may take in the agent, including its wait for a ztunnel",
    )
    host_probes: str = _probes(
        "auto",
        Choice(("auto", "nftables", "off"), former=("iptables", "iptables-legacy")),
        "mechanism of the node's probe exemption: auto (nftables) or off",
    )
    probe_ipv4: str = _probes(names.PROBE_IPV4, Address(4), "source address of the node's probes, IPv4")
    probe_ipv6: str = _probes(names.PROBE_IPV6, Address(6), "source address of the node's probes, IPv6")
    probe_canary: str = _probes(
        "report",
        Choice(("report", "rollback", "off")),
        "action when the probe of a newly enrolled pod fails: report, rollback (of the enrolment) or off",
    )
    kube_server: str = _kubernetes(
        "", API_SERVER, "URL of the Kubernetes API server (default in a pod: the cluster's own); none for no Kubernetes"
    )
    kube_token_file: str = _kubernetes(
        names.SERVICE_ACCOUNT + "/token",
        PATH,
        "file with the token for the API server; read again when it changes",
        followed="the file is read again when it changes",
    )
    kube_ca_file: str = _kubernetes(
        names.SERVICE_ACCOUNT + "/ca.crt", PATH, "file with the CA certificates of the API server"
    )
    kube_peers: bool = _kubernetes(
        False, FLAG, "watch all pods and services of the cluster, for the names of peers in metrics and records"
    )
    cni_install: str = _cni(
        "auto",
        Choice(("auto", "own", "insert", "off")),
        "own (a configuration that wraps the primary one), insert (into it), off; auto: own in Kubernetes",
    )
    cni_conf_dir: str = _cni(
        "", OPTIONAL_DIRECTORY, "directory where the runtime reads CNI configurations (default: as the runtime reports)"
    )
    cni_bin_dir: str = _cni(
        "", OPTIONAL_DIRECTORY, "directory where the runtime finds CNI plugins (default: as the runtime reports)"
    )
    cni_conf_name: str = _cni(names.CNI_CONF, CONF_NAME, "file name of Sluice's own CNI configuration")
    cni_plugin: str = _cni(names.CNI_PLUGIN, PATH, "the plugin binary to install")
    host_root: str = _cni("/", PATH, "where the host's own file system is mounted")
    accounting: str = _account(
        "auto",
        Choice(("auto", "ebpf", "inet_diag", "off")),
        "how connections of pods are accounted for: auto, ebpf, inet_diag (coarser) or off",
    )
    dns_accounting: bool = _account(True, FLAG, "account for the DNS queries of pods too, unless accounting is off")
    connection_log: str = _account("", LOG_FILE, "file for one JSON line per ended connection; - is standard output")
    connection_log_bytes: int = _account(100 << 20, Whole(1 << 16, 1 << 40), "size at which that file is rotated")
    connection_log_keep: int = _account(2, Whole(0, 99), "number of rotated files to keep")
    connection_log_sample: int = _account(
        1, Whole(1, 1_000_000), "log one of so many connections; failed and leaked ones are always logged"
    )
    metrics_address: str = _account(
        "0.0.0.0:15014", HOST_PORT, "address:port of /metrics, /healthz and /readyz; empty for none"
    )
    metrics_label_sets: int = _account(
        5000, Whole(1, 1_000_000), "maximum label sets per connection metric; further ones are counted as overflow"
    )
    metrics_expire_seconds: float = _account(900.0, SECONDS, "seconds after which an unchanged label set is dropped")
    peers_file: str = _account(
        "",
        FILE,
        "file of workloads and services on other nodes, for the labels of metrics and for records (YAML)",
        followed="the file is read again when it changes",
    )
    trust_domain: str = _account("cluster.local", TEXT, "trust domain in the identities that metrics show")
    cluster: str = _account("Kubernetes", TEXT, "name of the cluster in metrics")

    @property
    def cni_socket(self) -> str:
        return f"{self.run_dir}/cni.sock"

    @property
    def bpf_map_sizes(self) -> dict[str, int]:
        return {name: int(number) for name, _, number in (word.partition("=") for word in self.bpf_sizes)}

    @property
    def admin_socket(self) -> str:
        return f"{self.run_dir}/agent.sock"


DECLARED: Mapping[str, Setting] = {one.name: Setting(one.name, one.default, **one.metadata) for one in fields(Settings)}


def build(*layers: Mapping[str, tuple[Any, str]]) -> Settings:
    """Merges layers, later ones win. Each maps a key to (value, source), source as in "sluice.yaml:3".

    Text values (environment, flags) are converted to the key's type. Raises SettingsError with the source.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, (value, source) in layer.items():
            if key not in DECLARED:
                raise SettingsError(f"{source}: unknown setting {key!r}; known: {', '.join(DECLARED)}")
            try:
                merged[key] = DECLARED[key].kind.parse(value)
            except ValueError as wrong:
                raise SettingsError(f"{source}: {key}: {value!r} is not {wrong}") from None
    settings = Settings(**merged)
    if settings.kube_peers and settings.peers_file:
        raise SettingsError("kube_peers and peers_file: names of peers come from one of them; unset the other")
    return settings
