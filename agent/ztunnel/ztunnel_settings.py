# SPDX-License-Identifier: Apache-2.0
"""The settings of the embedded ztunnel, and which of Istio's environment variables stand for them. Pure.

A DaemonSet that was made for Istio's image works unchanged: its variables are defaults, and options of the command come
before them. A variable of Istio's that is not understood is named once, in a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from agent.core import names
from agent.core.errors import SettingsError

DEFAULT_TOKEN: Final = "./var/run/secrets/tokens/istio-token"
MOST_WORKERS: Final = 64
DEFAULT_ROOTS: Final = "./var/run/secrets/istio/root-cert.pem"
REVOCATION_FAILURES: Final = ("open", "closed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZtunnelSettings:
    """Settings of the process; times are in seconds.

    `records` and `access_log`: a path, "-" for standard output, "" for none. `bpf_dir` is the agent's. `share`: how
    many open connections one pod may have. `dns_seconds`: how long a resolver may be silent before the pod gets
    SERVFAIL, less than the 5 s after which most resolver libraries give up. `ready_file`: a path, "" for none.
    `workers`: processes that serve the pods; with 1 this process does it, otherwise it supervises them, and each has
    its part of `share`.

    `stats_address`, `ready_address`, `admin_address`: HOST:PORT, "" for none; None is Istio's port with a mesh, and
    none without.

    `mesh`: a file, or https://HOST:PORT of istiod, "" for none: then everything goes on in plain. `identities`: where
    certificates come from (development:DIRECTORY, files:DIRECTORY, istio:URL or spiffe:URL). `revocation_lists`: a file
    or directory, "" for none; `revocation_failure`: what holds for peers without a current list, open or closed.

    `mesh_names`: False leaves all DNS to the resolvers.

    `gateway`: NAMESPACE/POD/SERVICE-ACCOUNT makes the process the east-west gateway that is this pod of the mesh;
    `gateway_address` is HOST:PORT.
    """

    zds_socket: str = names.ZDS_SOCKET
    records: str = "-"
    access_log: str = ""
    access_log_json: bool = False
    drain_seconds: float = 5.0
    dns_seconds: float = 4.0
    connect_seconds: float = 10.0
    bpf_dir: str = names.BPF_DIR
    share: int = 16384
    ready_file: str = ""
    workers: int = 2
    stats_address: str | None = None
    ready_address: str | None = None
    admin_address: str | None = None
    mesh: str = ""
    identities: str = ""
    gateway: str = ""
    gateway_address: str = "[::]:15008"
    revocation_lists: str = ""
    revocation_failure: str = "open"
    network: str = ""
    trust_domain: str = "cluster.local"
    cluster_domain: str = "cluster.local"
    cluster_id: str = "Kubernetes"
    preferred_namespace: str = ""
    mesh_names: bool = True
    response_baggage: bool = True
    tunnel_to_loopback: bool = True
    log_policies: bool = False
    mesh_roots: str = DEFAULT_ROOTS
    mesh_name: str = ""  # in istiod's certificate, if it is not its host
    ca_roots: str = DEFAULT_ROOTS
    ca_name: str = ""
    token_file: str = DEFAULT_TOKEN
    certificate_seconds: int = 86400
    node_name: str = ""
    pod_name: str = ""
    pod_namespace: str = ""
    pod_ip: str = ""
    mesh_headers: Mapping[str, str] = field(default_factory=dict)
    ca_headers: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)  # for istiod


def check(settings: ZtunnelSettings) -> None:
    """Raises SettingsError for settings that contradict each other."""
    if settings.mesh and not settings.identities:
        raise SettingsError("a mesh needs identities: set --identities, or CA_ADDRESS")
    if settings.identities and not settings.mesh:
        raise SettingsError("identities without a mesh: set --mesh, LOCAL_XDS_PATH or XDS_ADDRESS")
    if settings.gateway and (settings.gateway.count("/") != 2 or not settings.mesh):
        raise SettingsError("--gateway takes NAMESPACE/POD/SERVICE-ACCOUNT of a workload of the mesh, and needs --mesh")
    host_and_port(settings.gateway_address)
    if settings.revocation_failure not in REVOCATION_FAILURES:
        raise SettingsError(f"revocation failure: {settings.revocation_failure!r} is neither open nor closed")
    if settings.revocation_lists and not settings.mesh:
        raise SettingsError("revocation lists need a mesh: set --mesh, LOCAL_XDS_PATH or XDS_ADDRESS")
    if not 1 <= settings.workers <= MOST_WORKERS:
        raise SettingsError(f"workers: {settings.workers} is not between 1 and {MOST_WORKERS}")
    for address in (settings.stats_address, settings.ready_address, settings.admin_address):
        if address:
            host_and_port(address)
    if settings.access_log and not settings.mesh:
        raise SettingsError("an access log without a mesh: its ends would not be known; --records needs none")


def with_ports(settings: ZtunnelSettings) -> ZtunnelSettings:
    """Returns the settings with the addresses that hold for this mesh, or for none."""
    defaults = MESH_ADDRESSES if settings.mesh else ("", "", "")
    given = (settings.stats_address, settings.ready_address, settings.admin_address)
    stats, ready, admin = (new if old is None else old for old, new in zip(given, defaults, strict=True))
    return replace(settings, stats_address=stats, ready_address=ready, admin_address=admin)


def host_and_port(address: str) -> tuple[str, int]:
    """Returns the parts of HOST:PORT; an IPv6 address is in brackets. Raises SettingsError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) >= 1 << 16:
        raise SettingsError(f"{address!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def worker_count(text: str, cores: int) -> int:
    """Returns the number of `auto` (a quarter of the cores, at least 2), N, or as Istio has it P% or 0 (all cores).

    Raises ValueError.
    """
    if text == "auto":
        return min(max(cores // 4, 2), MOST_WORKERS)
    number = text.removesuffix("%")
    if not (number.isascii() and number.isdigit()):
        raise ValueError(f"{text!r} is neither auto nor a number")
    if text.endswith("%"):
        return min(max(-(-cores * int(number) // 100), 1), MOST_WORKERS)
    return int(number) or min(cores, MOST_WORKERS)


def from_environment(environment: Mapping[str, str], cores: int = 1) -> tuple[ZtunnelSettings, list[str]]:
    """Returns (settings, variables of Istio's that are not understood). Raises SettingsError."""
    values: dict[str, Any] = {}
    for variable, (name, convert) in _VARIABLES.items():
        if text := environment.get(variable, ""):
            try:
                values[name] = convert(text)
            except ValueError as error:
                raise SettingsError(f"environment variable {variable}: {error}") from None
    settings = ZtunnelSettings(**values)
    if threads := environment.get("ZTUNNEL_WORKER_THREADS"):
        try:
            settings = replace(settings, workers=worker_count(threads, _limited(cores, environment)))
        except ValueError as error:
            raise SettingsError(f"environment variable ZTUNNEL_WORKER_THREADS: {error}") from None
    if address := environment.get("CA_ADDRESS"):
        settings = replace(settings, identities=f"istio:{address if '://' in address else f'https://{address}'}")
    if grace := environment.get("TERMINATION_GRACE_PERIOD_SECONDS"):
        settings = replace(settings, drain_seconds=_drain_seconds(grace))
    return (
        replace(
            settings,
            mesh_headers=_prefixed(environment, "XDS_HEADER_"),
            ca_headers=_prefixed(environment, "CA_HEADER_"),
            metadata=_prefixed(environment, "ISTIO_META_"),
        ),
        sorted(name for name, value in environment.items() if value and _is_not_understood(name, value)),
    )


def _limited(cores: int, environment: Mapping[str, str]) -> int:
    """Returns the CPUs that the container may use: Istio's chart passes its limit, as 2, 500m or 1.5."""
    limit = environment.get("ZTUNNEL_RESOURCE_CPU_LIMIT") or environment.get("ZTUNNEL_CPU_LIMIT")
    if not limit:
        return cores
    number = limit.removesuffix("m")
    try:
        cpus = float(number) / (1 if number == limit else 1000)
        return min(cores, max(math.ceil(cpus), 1))
    except (ValueError, OverflowError):
        raise SettingsError(f"environment variable of the CPU limit: {limit!r} is no quantity") from None


def _is_not_understood(name: str, value: str) -> bool:
    return name.startswith("ISTIO_METAJSON_") or value.lower() != _NOT_UNDERSTOOD.get(name, value.lower())


# The defaults of stats_address, ready_address and admin_address with a mesh.
MESH_ADDRESSES: Final = (
    f"[::]:{names.ZTUNNEL_STATS_PORT}",
    f"[::]:{names.ZTUNNEL_READY_PORT}",
    f"127.0.0.1:{names.ZTUNNEL_ADMIN_PORT}",
)


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1")


def _seconds(text: str) -> float:
    """Returns the seconds of 30, 30s, 5m or 24h."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no duration, as 30s or 5m") from None


def _drain_seconds(text: str) -> float:
    """Returns the time for connections out of the pod's grace period, as Istio's ztunnel takes it."""
    try:
        grace = float(text)
    except ValueError:
        raise SettingsError(f"environment variable TERMINATION_GRACE_PERIOD_SECONDS: {text!r} is no number") from None
    return grace - 5 if grace > 10 else max(grace - 1, 0.0)


def _prefixed(environment: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): value for name, value in environment.items() if name.startswith(prefix)}


_VARIABLES: Final[Mapping[str, tuple[str, Callable[[str], Any]]]] = {
    "INPOD_UDS": ("zds_socket", str),
    "XDS_ADDRESS": ("mesh", lambda text: text if "://" in text else f"https://{text}"),
    "LOCAL_XDS_PATH": ("mesh", str),  # a file comes before istiod
    "CRL_PATH": ("revocation_lists", str),
    "NETWORK": ("network", str),
    "TRUST_DOMAIN": ("trust_domain", str),
    "CLUSTER_DOMAIN": ("cluster_domain", str),
    "CLUSTER_ID": ("cluster_id", str),
    "ISTIO_META_CLUSTER_ID": ("cluster_id", str),  # comes before the other one
    "ISTIO_META_DNS_CAPTURE": ("mesh_names", lambda text: text.lower() == "true"),
    "LOG_FORMAT": ("access_log_json", lambda text: text.lower() == "json"),
    "PREFERED_SERVICE_NAMESPACE": ("preferred_namespace", str),  # spelled so
    "ENABLE_RESPONSE_BAGGAGE": ("response_baggage", _flag),
    "LOCALHOST_APP_TUNNEL": ("tunnel_to_loopback", _flag),
    "AUTHZ_POLICY_INFO_LOGGING": ("log_policies", _flag),
    "XDS_ROOT_CA": ("mesh_roots", str),
    "ALT_XDS_HOSTNAME": ("mesh_name", str),
    "CA_ROOT_CA": ("ca_roots", str),
    "ALT_CA_HOSTNAME": ("ca_name", str),
    "AUTH_TOKEN": ("token_file", str),
    "SECRET_TTL": ("certificate_seconds", lambda text: int(_seconds(text))),
    "CONNECTION_TERMINATION_DEADLINE": ("drain_seconds", _seconds),
    "NODE_NAME": ("node_name", str),
    "POD_NAME": ("pod_name", str),
    "POD_NAMESPACE": ("pod_namespace", str),
    "INSTANCE_IP": ("pod_ip", str),
}
# Variables that change what Istio's ztunnel does and this one does not follow, with the value that changes nothing.
_NOT_UNDERSTOOD: Final[Mapping[str, str]] = {
    **dict.fromkeys(("ENABLE_PROXY", "INPOD_PORT_REUSE", "IPV6_ENABLED", "KEEPALIVE_ENABLED"), "true"),
    **dict.fromkeys(
        ("FAKE_CA", "TLS12_ENABLED", "UNSTABLE_ENABLE_SOCKS5", "USER_TIMEOUT_ENABLED", "XDS_ON_DEMAND"), "false"
    ),
    "KEEPALIVE_INTERVAL": "180s",
    "KEEPALIVE_RETRIES": "9",
    "KEEPALIVE_TIME": "180s",
    "PROXY_MODE": "shared",
    "RUST_LOG": "info",
    **dict.fromkeys((
        "COMPLIANCE_POLICY", "ENABLE_ORIG_SRC", "HTTP2_CONNECTION_WINDOW_SIZE", "HTTP2_FRAME_SIZE",
        "HTTP2_STREAM_WINDOW_SIZE", "ISTIO_META_DNS_PROXY_ADDR", "LOCAL_XDS", "PACKET_MARK",
        "POOL_MAX_STREAMS_PER_CONNECTION", "POOL_UNUSED_RELEASE_TIMEOUT", "PROXY_CONFIG", "PROXY_WORKLOAD_INFO",
    ), ""),
}  # fmt: skip
