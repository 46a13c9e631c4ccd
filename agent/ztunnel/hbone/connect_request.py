# SPDX-License-Identifier: Apache-2.0
"""The request and the response of HBONE as header fields (RFC 9113, 8.5). Pure."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Final

Headers = list[tuple[bytes, bytes]]

_MOST_HOST: Final = 255


@dataclass(frozen=True, slots=True)
class ConnectRequest:
    """`host` is an address in canonical form or a host name; `headers` the fields without pseudo-fields, as text."""

    host: str
    port: int
    headers: dict[str, str]


def parse(headers: Headers) -> ConnectRequest | None:
    """Returns the request; None if it is not a well-formed CONNECT, which is answered with 400.

    Some clients send :scheme and :path as for other methods; both are ignored.
    """
    pseudo: dict[bytes, bytes] = {}
    fields: dict[str, str] = {}
    for name, value in headers:
        if name.startswith(b":"):
            if fields or name in pseudo:
                return None
            pseudo[name] = value
        else:
            fields.setdefault(name.decode("latin-1"), value.decode("latin-1"))
    authority = parse_authority(pseudo.get(b":authority", b"").decode("latin-1"))
    if pseudo.get(b":method") != b"CONNECT" or authority is None:
        return None
    return ConnectRequest(*authority, fields)


def parse_authority(text: str) -> tuple[str, int] | None:
    """Returns host and port of host:port, 1.2.3.4:port or [v6]:port; None if it has another form."""
    host, separator, digits = text.rpartition(":")
    if not separator or not digits.isascii() or not digits.isdigit() or not 0 < int(digits[:6]) < 1 << 16:
        return None
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    try:
        address = ip_address(host)
    except ValueError:
        named = host.isascii() and host.replace("-", "a").replace(".", "a").replace("_", "a").isalnum()
        return (host, int(digits)) if named and not bracketed and len(host) <= _MOST_HOST else None
    return (str(address), int(digits)) if isinstance(address, IPv6Address) is bracketed else None


def forwarded_host(value: str) -> str:
    """Returns the host of a `forwarded` header: the service that the client meant; "" if it names none."""
    for pair in value.split(";"):
        key, _, text = pair.strip().partition("=")
        if key.lower() == "host":
            return text.strip('"')
    return ""


def request(authority: str, fields: tuple[tuple[str, str], ...]) -> Headers:
    """Returns the header fields of a CONNECT."""
    return [(b":method", b"CONNECT"), (b":authority", authority.encode("latin-1")), *_encoded(fields)]


def response(status: int, fields: tuple[tuple[str, str], ...] = ()) -> Headers:
    return [(b":status", str(status).encode()), *_encoded(fields)]


def _encoded(fields: tuple[tuple[str, str], ...]) -> Headers:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
