"""The agent's settings: one frozen value, from file, environment and flags, parsed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from agent.core import names
from agent.core.errors import SettingsError
from agent.core.selectors import DEFAULT, Selector
from agent.core.settingvalues import convert


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting with its default. The metadata of a field is its one-line help, see HELP."""

    node_name: str = ""
    run_dir: str = names.RUN_DIR
    bpf_dir: str = names.BPF_DIR
    bpf_sizes: tuple[str, ...] = ()
    zds_socket: str = names.ZDS_SOCKET
    ztunnel_ports: tuple[str, ...] = ("15001", "15006", "15008")
    metrics_address: str = "0.0.0.0:15014"
    static_pods: str = ""
    backend: str = "auto"
    dns_capture: bool = True
    dns_capture_to: str = "any"
    dns_resolvers: tuple[str, ...] = ()
    ipv6: bool = True
    probe_ipv4: str = names.PROBE_IPV4
    probe_ipv6: str = names.PROBE_IPV6
    kube_server: str = ""
    kube_token_file: str = names.SERVICE_ACCOUNT + "/token"
    kube_ca_file: str = names.SERVICE_ACCOUNT + "/ca.crt"
    kube_peers: bool = False
    own_namespace: str = ""
    enablement_selectors: tuple[Selector, ...] = DEFAULT
    exclude_namespaces: tuple[str, ...] = ("kube-system",)
    exempt_pods: tuple[str, ...] = ("istio-system/ztunnel-*",)
    unsupported_runtimes: tuple[str, ...] = ("gvisor",)
    offline_pods: str = "by-namespace"
    startup_taint: str = ""
    startup_taint_returns: bool = False
    cni_install: str = "auto"
    cni_conf_dir: str = ""
    cni_bin_dir: str = ""
    cni_conf_name: str = names.CNI_CONF
    cni_plugin: str = names.CNI_PLUGIN
    host_root: str = "/"
    sidecar_annotations: bool = False
    non_tcp: str = "count"
    preserve_connections: bool = True
    host_probes: str = "auto"
    probe_canary: str = "report"
    verify_seconds: float = 30.0
    ack_seconds: float = 5.0
    add_seconds: float = 18.0  # Istio's ztunnel comes back within 15, the plugin gives up after 20
    accounting: str = "auto"
    connection_log: str = ""
    connection_log_bytes: int = 100 << 20
    connection_log_keep: int = 2
    connection_log_sample: int = 1
    peers_file: str = ""
    trust_domain: str = "cluster.local"
    cluster: str = "Kubernetes"
    metrics_label_sets: int = 5000
    metrics_expire_seconds: float = 900.0
    log_level: str = "info"

    @property
    def cni_socket(self) -> str:
        return f"{self.run_dir}/cni.sock"

    @property
    def bpf_map_sizes(self) -> dict[str, int]:
        return {name: int(number) for name, _, number in (word.partition("=") for word in self.bpf_sizes)}

    @property
    def admin_socket(self) -> str:
        return f"{self.run_dir}/agent.sock"


HELP: Mapping[str, str] = {
    "node_name": "name of this node in logs and metrics (default: the host's name)",
    "run_dir": "directory of sockets, state and pinned namespaces",
    "bpf_dir": "directory in a bpf file system of what backend ebpf keeps; uncapture all before you change it",
    "bpf_sizes": "entries of BPF maps that are made from now on, as in pods=4096,handover=65536; records: bytes",
    "zds_socket": "unix socket on which ztunnel connects",
    "ztunnel_ports": "ports on which ztunnel has to listen in a captured pod (`sluice ztunnel`: 15001,15006)",
    "metrics_address": "address:port of /metrics, /healthz and /readyz; empty for none",
    "static_pods": "file of pods that no CNI call announces, or that it enrols (YAML)",
    "backend": "auto, nftables, iptables (its nf_tables variant), iptables-legacy, or ebpf (else as auto)",
    "dns_capture": "capture DNS, unless a pod's annotation says otherwise",
    "dns_capture_to": "any, or resolvers: capture DNS only towards the resolvers that the pod is configured with",
    "dns_resolvers": "resolvers of pods whose own are not known (dns_capture_to: resolvers)",
    "ipv6": "program IPv6 where a pod has it",
    "probe_ipv4": "source address of the node's probes, IPv4",
    "probe_ipv6": "source address of the node's probes, IPv6",
    "kube_server": "URL of the Kubernetes API server; in a pod the cluster's own; none for no Kubernetes",
    "kube_token_file": "file of the token for the API server; read again when it changes",
    "kube_ca_file": "certificates that the API server is checked against",
    "kube_peers": "watch all pods and services of the cluster, for the names of peers in metrics and records",
    "own_namespace": "namespace of the agent's own pods, which are never captured (in a pod: its own)",
    "enablement_selectors": "which pods are enrolled: list of {podSelector, namespaceSelector} (elsewhere: JSON)",
    "exclude_namespaces": "namespaces whose pods are never captured",
    "exempt_pods": "NAMESPACE/NAME of pods that never are and start without the agent; * ends a name's beginning",
    "unsupported_runtimes": "runtime classes whose pods cannot be captured, having a network stack of their own",
    "offline_pods": "pods that cannot be looked up while the API server or the agent is away: by-namespace, or refuse",
    "startup_taint": "taint that the agent takes from its node once no pod can start there uncaptured; empty for none",
    "startup_taint_returns": "put that taint back while pods could start uncaptured",
    "cni_install": "own (a configuration that wraps the primary one), insert (into it), off; auto: own in Kubernetes",
    "cni_conf_dir": "the runtime's directory of CNI configurations (default: as the runtime says)",
    "cni_bin_dir": "the runtime's directory of CNI plugins (default: as the runtime says)",
    "cni_conf_name": "file name of our own CNI configuration",
    "cni_plugin": "the plugin's binary that is installed",
    "host_root": "where the host's own file system is mounted",
    "sidecar_annotations": "honour the exclusions of traffic.sidecar.istio.io annotations too",
    "non_tcp": "what becomes of a pod's traffic that is neither TCP nor captured DNS: count or refuse",
    "preserve_connections": "let connections that are older than a pod's enrolment run on uncaptured",
    "host_probes": "mechanism of the node's probe exemption: auto (nftables) or off",
    "probe_canary": "what a failing probe of a newly enrolled pod does: report, rollback (of the enrolment) or off",
    "verify_seconds": "seconds between two verifications of a pod",
    "ack_seconds": "seconds that ztunnel has to acknowledge one pod",
    "add_seconds": "seconds that a CNI ADD may take in the agent, including its wait for a ztunnel",
    "accounting": "how connections of pods are accounted for: auto, ebpf, inet_diag (coarser) or off",
    "connection_log": "file that gets a line of JSON for each connection that ended; - is the standard output",
    "connection_log_bytes": "size at which that file is rotated",
    "connection_log_keep": "rotated files that are kept",
    "connection_log_sample": "write one of so many connections there; failed and leaked ones are always written",
    "peers_file": "file of workloads and services on other nodes, for the labels of metrics and for records (YAML)",
    "trust_domain": "trust domain in the identities that metrics show",
    "cluster": "name of the cluster in metrics",
    "metrics_label_sets": "label sets of each metric of connections; what does not fit is counted as overflow",
    "metrics_expire_seconds": "seconds after which a label set that nothing was added to is forgotten",
    "log_level": "debug, info, warning or error",
}
_KINDS = {f.name: str(f.type) for f in fields(Settings)}


def build(*layers: Mapping[str, tuple[Any, str]]) -> Settings:
    """Merges layers, later ones win. Each maps a key to (value, place), place as in "sluice.yaml:3".

    Text values (environment, flags) are converted to the key's type. Raises SettingsError with the place.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, (value, place) in layer.items():
            if key not in _KINDS:
                raise SettingsError(f"{place}: unknown setting {key!r}; known: {', '.join(_KINDS)}")
            merged[key] = convert(key, _KINDS[key], value, place)
    made = Settings(**merged)
    if made.kube_peers and made.peers_file:
        raise SettingsError("kube_peers and peers_file: names of peers come from one of them; unset the other")
    return made
