# SPDX-License-Identifier: Apache-2.0
"""Checks the identities in a peer's certificate after OpenSSL has verified its chain. Pure.

A certificate is what `ssl.SSLObject.getpeercert` returns. Names of hosts do not matter: identities are URIs.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from agent.core.errors import SluiceError
from agent.ztunnel.tls.spiffe import SpiffeId, parse


class PeerError(SluiceError):
    """The peer has a valid certificate of an identity that is not accepted."""


def uris(certificate: Mapping[str, Any] | None) -> list[str]:
    """Returns the URI names of the certificate, in order."""
    return [value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind == "URI"]


def client_identity(certificate: Mapping[str, Any] | None, trust_domain: str) -> SpiffeId:
    """Returns who the client is: its first identity. One of its identities must be of `trust_domain`.

    Raises PeerError.
    """
    names = uris(certificate)
    identities = [identity for identity in map(parse, names) if identity is not None]
    if not identities:
        raise PeerError(f"the client's certificate has no SPIFFE identity: {', '.join(names) or 'no URI'}")
    if all(identity.trust_domain != trust_domain for identity in identities):
        raise PeerError(f"the client {identities[0]} is not of the trust domain {trust_domain}")
    return identities[0]


def check_server(certificate: Mapping[str, Any] | None, expected: Set[str]) -> str:
    """Returns the identity of the server, which is one of the expected ones. Raises PeerError."""
    names = uris(certificate)
    found = next((name for name in names if name in expected), None)
    if found is None:
        wanted = " or ".join(sorted(expected)) or "an unknown identity"
        raise PeerError(f"the server is {', '.join(names) or 'without a URI'}, not {wanted}")
    return found
