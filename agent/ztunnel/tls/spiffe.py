# SPDX-License-Identifier: Apache-2.0
"""SPIFFE identities as Istio forms them: spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT. Pure."""

from __future__ import annotations

from dataclasses import dataclass

_SCHEME = "spiffe://"


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """Identity of a workload."""

    trust_domain: str
    namespace: str
    service_account: str

    def __str__(self) -> str:
        return f"{_SCHEME}{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"


def parse(uri: str) -> SpiffeId | None:
    """Returns the identity of a URI; None if it has another form. Parts may be empty, as with Istio's ztunnel."""
    if not uri.startswith(_SCHEME):
        return None
    parts = uri.removeprefix(_SCHEME).split("/")
    if len(parts) != 5 or parts[1] != "ns" or parts[3] != "sa":
        return None
    return SpiffeId(parts[0], parts[2], parts[4])
