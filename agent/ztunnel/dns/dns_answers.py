# SPDX-License-Identifier: Apache-2.0
"""Answers DNS queries for names of the mesh, as Istio's ztunnel does; everything else is for the resolver. Pure.

Only A and AAAA of services are answered. A service without an address is answered by its endpoints if it is a headless
service of Kubernetes, which its domain shows, and otherwise left to the resolver.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from agent.ztunnel.mesh.mesh_model import Service, Workload
from agent.ztunnel.mesh.mesh_store import MeshStore, best

TTL: Final = 30  # seconds
UDP_SIZE: Final = 512  # bytes of an answer without EDNS (RFC 1035, 2.3.4)
_LARGEST_EDNS: Final = 4096
_HEADER: Final = struct.Struct(">HHHHHH")
_RECORD: Final = struct.Struct(">HHIH")  # type, class, TTL, length
_ANSWER, _OPERATION, _AUTHORITATIVE, _TRUNCATED, _RECURSION = 0x8000, 0x7800, 0x0400, 0x0200, 0x0180
_A, _CNAME, _AAAA, _OPT, _INTERNET = 1, 5, 28, 41, 1
_POINTER: Final = 0xC000
_NAME_AT: Final = 12  # the question follows the header
# Of a message of 64 KiB; besides them it may have the question, an alias and an OPT record.
_MOST_ADDRESSES: Final = {_A: (65535 - 600) // 16, _AAAA: (65535 - 600) // 28}

Labels = tuple[str, ...]
Shuffle = Callable[[list[str]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A query for addresses. `edns` is the size that the client takes by UDP, 0 without EDNS.

    `name` is as in a message, in lower case; `question` is as it was asked.
    """

    number: int
    flags: int
    name: bytes
    kind: int
    question: bytes
    edns: int


@dataclass(frozen=True, slots=True)
class Match:
    """The service that a name means."""

    service: Service
    stripped: Labels  # the name without the search domain, if the client used one
    wildcard: bool


def query(message: bytes, question: bytes) -> Query | None:
    """Returns the query; None if the message is anything else than a query for A or AAAA.

    `question` is that of dnsmessage, and not empty.
    """
    number, flags, _, answers, authorities, additional = _HEADER.unpack_from(message)
    kind, family = struct.unpack(">HH", question[-4:])
    if kind not in (_A, _AAAA) or family != _INTERNET or flags & _OPERATION or answers or authorities:
        return None
    edns = _edns_size(message[len(question) :], additional)
    if edns is None:
        return None
    return Query(
        number=number, flags=flags, name=question[_NAME_AT:-4].lower(), kind=kind, question=question[_NAME_AT:],
        edns=edns,
    )  # fmt: skip


def _edns_size(rest: bytes, additional: int) -> int | None:
    """Returns the size of an OPT record, 0 without one, None for records that only the resolver understands."""
    if not additional and not rest:
        return 0
    if additional != 1 or len(rest) < 11 or rest[0]:
        return None
    kind, size = struct.unpack_from(">HH", rest, 1)
    return max(UDP_SIZE, min(size, _LARGEST_EDNS)) if kind == _OPT else None


def answer(
    store: MeshStore, client: Workload, asked: Query, match: Match, shuffle: Shuffle, *, udp: bool
) -> bytes:  # fmt: skip
    """Returns the answer for `client` to a query that means the service."""
    addresses = _addresses(store, client, match.service, 4 if asked.kind == _A else 6)
    shuffle(addresses)
    message = _message(asked, match, addresses[: _MOST_ADDRESSES[asked.kind]])
    if udp and len(message) > (asked.edns or UDP_SIZE):
        return _head(asked, _TRUNCATED, 0) + asked.question + _opt(asked)
    return message


def _message(asked: Query, match: Match, addresses: list[str]) -> bytes:
    records = b""
    owner = _POINTER | _NAME_AT
    count = len(addresses)
    if addresses and match.stripped and not match.wildcard:
        canonical = b"".join(bytes((len(label),)) + label.encode() for label in match.stripped) + b"\0"
        records = struct.pack(">H", owner) + _RECORD.pack(_CNAME, _INTERNET, TTL, len(canonical)) + canonical
        owner = _POINTER | _NAME_AT + len(asked.question) + 2 + _RECORD.size
        count += 1
    for ip in addresses:
        packed = ip_address(ip).packed
        records += struct.pack(">H", owner) + _RECORD.pack(asked.kind, _INTERNET, TTL, len(packed)) + packed
    return _head(asked, 0, count) + asked.question + records + _opt(asked)


def _head(asked: Query, extra: int, answers: int) -> bytes:
    flags = _ANSWER | _AUTHORITATIVE | extra | asked.flags & 0x0100 | _RECURSION & 0x0080
    return _HEADER.pack(asked.number, flags, 1, answers, 0, 1 if asked.edns else 0)


def _opt(asked: Query) -> bytes:
    return b"\0" + struct.pack(">HHIH", _OPT, _LARGEST_EDNS, 0, 0) if asked.edns else b""


def find(store: MeshStore, namespace: str, name: bytes, domain: str) -> Match | None:
    """Returns the service that `name`, of a query, means to a client in the namespace; None for a name of the resolver.

    `domain` is that of the cluster.
    """
    if not name.isascii():
        return None
    service_domain = (*_labels("svc"), *_labels(domain))
    suffix = ".".join(("", *service_domain))
    for alias, stripped in _aliases(_split(name), namespace, service_domain):
        for candidate in _with_wildcards(alias):
            named = [
                service
                for service in store.services_named(".".join(candidate), namespace)
                if service.addresses or service.hostname.endswith(suffix)
            ]
            if service := best(named, namespace, store.preferred_namespace):
                return Match(service, stripped, candidate[:1] == ("*",))
    return None


def _split(name: bytes) -> Labels:
    labels = []
    at = 0
    while length := name[at]:
        labels.append(name[at + 1 : at + 1 + length].decode())
        at += 1 + length
    return tuple(labels)


def _aliases(name: Labels, namespace: str, service_domain: Labels) -> Iterator[tuple[Labels, Labels]]:
    """Yields (a name that may be meant, the name without its search domain or nothing), each name once."""
    own = (namespace, *service_domain)
    seen = set()
    pairs: list[tuple[Labels, Labels]] = [(alias, ()) for alias in (name, *_expanded(name, own, service_domain))]
    for search in (own, service_domain, service_domain[1:]):
        if len(name) > len(search) and name[-len(search) :] == search:
            stripped = name[: -len(search)]
            pairs += [(alias, stripped) for alias in (stripped, *_expanded(stripped, own, service_domain))]
    for alias, stripped in pairs:
        if alias not in seen:
            seen.add(alias)
            yield alias, stripped


def _expanded(name: Labels, own: Labels, service_domain: Labels) -> list[Labels]:
    """Returns the full names in Kubernetes for which the name may be short.

    A service has SERVICE.NAMESPACE.svc.DOMAIN, a pod with a subdomain HOST.SUBDOMAIN.NAMESPACE.svc.DOMAIN.
    """
    domain = service_domain[1:]
    in_svc = name[-1:] == ("svc",)
    match len(name):
        case 1:
            return [(*name, *own)]
        case 2:
            return [(*name, *service_domain), (*name, *own)]
        case 3:
            return [*([(*name, *domain)] if in_svc else []), (*name, *service_domain)]
        case 4 if in_svc:
            return [(*name, *domain)]
    return []


def _with_wildcards(name: Labels) -> Iterator[Labels]:
    """Yields the name, then *.example.com, *.com for www.example.com."""
    yield name
    for cut in range(1, len(name)):
        yield ("*", *name[cut:])


def _addresses(store: MeshStore, client: Workload, service: Service, version: int) -> list[str]:
    if service.ip_families and version not in service.ip_families.value:
        return []
    if service.addresses:
        usable = (one.ip for one in service.addresses if one.network == client.network)
        return [ip for ip in usable if ip_address(ip).version == version]
    ends = (endpoint.workload.addresses for endpoint in store.endpoints(service))
    first = (next((ip for ip in ips if ip_address(ip).version == version), "") for ips in ends)
    return [ip for ip in first if ip]


def _labels(name: str) -> Labels:
    return tuple(name.lower().strip(".").split("."))
