# SPDX-License-Identifier: Apache-2.0
"""Label sets of the metrics of connections, written once and kept: a scrape only joins them. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from agent.flows.identity import Service, Workload
from agent.flows.record import Direction, Fate, Reason

UNKNOWN = "unknown"
OVERFLOW = "overflow"
# The end of each set of traffic(): the two kinds differ in nothing else.
OPENED = 'request_protocol="tcp",response_flags="-",connection_security_policy="unknown"'
FAILED = 'request_protocol="tcp",response_flags="CONNECT",connection_security_policy="unknown"'

# An end's labels in the order of ztunnel's CommonTrafficLabels (istio/ztunnel, src/proxy/metrics.rs).
_END = (
    "workload", "canonical_service", "canonical_revision", "workload_namespace", "principal", "app", "version",
    "cluster",
)  # fmt: skip
_SERVICE = ("service", "service_namespace", "service_name")


# The peers of the one set per reporter that takes the overflow.
_ANY = Workload(
    OVERFLOW,
    OVERFLOW,
    service_account=OVERFLOW,
    app=OVERFLOW,
    version=OVERFLOW,
    cluster=OVERFLOW,
    canonical_service=OVERFLOW,
    canonical_revision=OVERFLOW,
)
REST = (_ANY, _ANY, Service(OVERFLOW, OVERFLOW, OVERFLOW))
_NAMES = (
    "reporter",
    *(f"source_{name}" for name in _END),
    *(f"destination_{name}" for name in _SERVICE),
    *(f"destination_{name}" for name in _END),
)


def traffic(
    direction: Direction, pod: Workload | None, remote: Workload | None, service: Service | None, trust_domain: str
) -> str:
    """Returns the labels of istio_tcp_* that precede OPENED or FAILED, with a comma at the end."""
    outbound = direction is Direction.OUTBOUND
    source, destination = (pod, remote) if outbound else (remote, pod)
    values = (
        "source" if outbound else "destination",
        *_end(source, trust_domain),
        *((service.host, service.namespace, service.name) if service else ("", "", "")),
        *_end(destination, trust_domain),
    )
    return pairs(zip(_NAMES, values, strict=True)) + ","


def _end(of: Workload | None, trust_domain: str) -> tuple[str, ...]:
    if of is None:
        return ("",) * len(_END)
    principal = OVERFLOW if of == REST[0] else of.principal(trust_domain)
    return (
        of.name, of.canonical_service, of.canonical_revision, of.namespace, principal, of.app, of.version,
        of.cluster,
    )  # fmt: skip


def owner(namespace: str, workload: str, direction: Direction) -> str:
    return pairs((("namespace", namespace), ("workload", workload), ("direction", direction.word)))


def fated(namespace: str, workload: str, direction: Direction, fate: Fate, reason: Reason) -> str:
    return f"{owner(namespace, workload, direction)},{pairs((('fate', fate.word), ('reason', reason.word)))}"


def pairs(labels: Iterable[tuple[str, str]]) -> str:
    """Returns name="value",... with `unknown` for empty values: Prometheus treats an empty label as missing."""
    return ",".join(f'{name}="{escaped(value or UNKNOWN)}"' for name, value in labels)


def escaped(value: str) -> str:
    """Escapes a label's value for both text formats; a lone surrogate, which UTF-8 cannot encode, becomes "?"."""
    plain = value.encode("utf-8", "replace").decode()
    return plain.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
