"""The agent's settings: one frozen value, from file, environment and flags, parsed once."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from agent.core import names, selectors
from agent.core.errors import SettingsError
from agent.core.selectors import DEFAULT, Selector

_MOST_ENTRIES = 1 << 24
_NETFILTER = ("nftables", "iptables", "iptables-legacy")
BACKENDS = ("auto", *_NETFILTER, "ebpf")
# The values of the settings that are one word of a few.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "backend": BACKENDS,
    "host_probes": ("auto", *_NETFILTER, "off"),
    "probe_canary": ("report", "rollback", "off"),
    "dns_capture_to": ("any", "resolvers"),
    "non_tcp": ("count", "refuse"),
    "accounting": ("auto", "ebpf", "inet_diag", "off"),
    "cni_install": ("auto", "own", "insert", "off"),
    "offline_pods": ("by-namespace", "refuse"),
    "log_level": ("debug", "info", "warning", "error"),
}
# Least and most of the settings that are whole numbers.
RANGES: Mapping[str, tuple[int, int]] = {
    "connection_log_bytes": (1 << 16, 1 << 40),
    "connection_log_keep": (0, 99),
    "connection_log_sample": (1, 1_000_000),
    "metrics_label_sets": (1, 1_000_000),
}


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
    add_seconds: float = 10.0
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
    "bpf_dir": "directory of what backend ebpf keeps in the kernel, in a bpf file system",
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
    "startup_taint": "taint that the agent takes from its node once capture works; empty for none",
    "startup_taint_returns": "put that taint back while capture cannot be guaranteed",
    "cni_install": "own (a configuration that wraps the primary one), insert (into it), off; auto: own in Kubernetes",
    "cni_conf_dir": "the runtime's directory of CNI configurations (default: as the runtime says)",
    "cni_bin_dir": "the runtime's directory of CNI plugins (default: as the runtime says)",
    "cni_conf_name": "file name of our own CNI configuration",
    "cni_plugin": "the plugin's binary that is installed",
    "host_root": "where the host's own file system is mounted",
    "sidecar_annotations": "honour the exclusions of traffic.sidecar.istio.io annotations too",
    "non_tcp": "what becomes of a pod's traffic that is neither TCP nor captured DNS: count or refuse",
    "preserve_connections": "let connections that are older than a pod's enrolment run on uncaptured",
    "host_probes": "mechanism of the node's probe exemption: auto, nftables, iptables, iptables-legacy or off",
    "probe_canary": "what a failing probe of a newly enrolled pod does: report, rollback (of the enrolment) or off",
    "verify_seconds": "seconds between two verifications of a pod",
    "ack_seconds": "seconds that ztunnel has to acknowledge one pod",
    "add_seconds": "seconds that a CNI ADD may take in the agent",
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
_PATHS = ("run_dir", "bpf_dir", "zds_socket", "kube_token_file", "kube_ca_file", "cni_plugin", "host_root")
_EXEMPT = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?/[a-z0-9][-a-z0-9.]{0,252}\*?")
_CONF_NAME = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.]{0,200}\.conflist")
_URL = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[-a-zA-Z0-9.]+)(:[0-9]{1,5})?")
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
            merged[key] = _convert(key, value, place)
    made = Settings(**merged)
    if made.kube_peers and made.peers_file:
        raise SettingsError("kube_peers and peers_file: names of peers come from one of them; unset the other")
    return made


def _convert(key: str, value: Any, place: str) -> Any:
    def refuse(what: str) -> SettingsError:
        return SettingsError(f"{place}: {key}: {value!r} is not {what}")

    kind = _KINDS[key]
    if kind == "bool":
        text = str(value).lower()
        if text not in ("true", "false"):
            raise refuse("true or false")
        return text == "true"
    if kind == "int":
        return _whole(str(value), *RANGES[key], refuse)
    if kind == "float":
        try:
            number = float("yes" if isinstance(value, bool) else value)
        except (TypeError, ValueError, OverflowError):
            raise refuse("a number of seconds") from None
        if not 0 < number <= 3600:
            raise refuse("a number of seconds between 0 and 3600")
        return number
    if kind.startswith("tuple[Selector"):
        return _selectors(value, refuse)
    if kind.startswith("tuple"):
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise refuse("a list of names")
        words = tuple(part.strip() for part in parts if part.strip())
        if key == "bpf_sizes":
            return tuple(_size(word, refuse) for word in words)
        if key == "ztunnel_ports":
            return tuple(str(_whole(word, 1, 65535, refuse)) for word in words)
        if key == "dns_resolvers":
            return tuple(_address(word, refuse) for word in words)
        if key == "exempt_pods" and not all(_EXEMPT.fullmatch(word) for word in words):
            raise refuse("a list of NAMESPACE/NAME, where only NAME may end with *")
        return words
    if not isinstance(value, str):
        raise refuse("text")
    return _text(key, value, refuse)


def _text(key: str, value: str, refuse: Any) -> str:
    if key in CHOICES and value not in CHOICES[key]:
        raise refuse("one of " + ", ".join(CHOICES[key]))
    if key in _PATHS and (not value.startswith("/") or len(value) > 90):
        raise refuse("an absolute path of at most 90 characters")
    if key == "kube_server" and value not in ("", "none") and not _URL.fullmatch(value):
        raise refuse("a URL like https://10.96.0.1:443, or none")
    if key in ("cni_conf_dir", "cni_bin_dir") and value and not value.startswith("/"):
        raise refuse("an absolute path")
    if key == "cni_conf_name" and not _CONF_NAME.fullmatch(value):
        raise refuse("a file name that ends with .conflist")
    if key == "connection_log" and not value.startswith("/") and value not in ("", "-"):
        raise refuse("an absolute path, or - for the standard output")
    if key == "metrics_address" and value and not _host_port(value):
        raise refuse("address:port")
    for version in (4, 6):
        if key == f"probe_ipv{version}":
            return _address(value, refuse, version)
    return value


def _selectors(value: Any, refuse: Any) -> tuple[Selector, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise refuse("JSON: a list of {podSelector, namespaceSelector}") from None
    try:
        return selectors.parse(value)
    except SettingsError as wrong:
        raise refuse(f"usable: {wrong}") from None


def _whole(value: str, least: int, most: int, refuse: Any) -> int:
    if not value.isascii() or not value.isdecimal() or len(value) > 20 or not least <= int(value) <= most:
        raise refuse(f"a whole number from {least} to {most}")
    return int(value)


def _size(word: str, refuse: Any) -> str:
    """MAP=ENTRIES of a map of names.BPF_MAPS."""
    name, sign, number = word.partition("=")
    if not sign or name not in names.BPF_MAPS or not number.isdecimal() or not 1 <= int(number) <= _MOST_ENTRIES:
        raise refuse(f"a list of MAP=ENTRIES (1 to {_MOST_ENTRIES}) with MAP of {', '.join(names.BPF_MAPS)}")
    return f"{name}={int(number)}"


def _address(value: str, refuse: Any, version: int | None = None) -> str:
    """As the ipaddress module writes it."""
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        address = None
    if address is None or version not in (None, address.version) or getattr(address, "scope_id", None):
        raise refuse(f"an IPv{version} address" if version else "a list of addresses")
    return str(address)


def _host_port(value: str) -> bool:
    host, _, port = value.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 65536
