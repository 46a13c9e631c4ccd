# SPDX-License-Identifier: Apache-2.0
"""Describes the certificates of this node for /config_dump; keys are left out."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

from cryptography import x509

from agent.core.text import utc
from agent.ztunnel.tls.certificates import CertificateState, CertificateStatus
from agent.ztunnel.tls.keys import moment

_END = b"-----END CERTIFICATE-----\n"


def certificates(statuses: Iterable[CertificateStatus]) -> list[dict[str, Any]]:
    """Returns one entry for each identity, sorted."""
    return sorted(map(_entry, statuses), key=lambda entry: str(entry["identity"]))


def _entry(status: CertificateStatus) -> dict[str, Any]:
    state = status.state.value
    if status.state is CertificateState.UNAVAILABLE:
        state = f"{state}: {status.error}"
    held = status.credentials if status.state is CertificateState.AVAILABLE else None
    return {
        "identity": str(status.identity),
        "state": state,
        "certChain": _described(held.chain) if held else [],
        "rootCerts": _described(held.roots) if held else [],
    }


def _described(chain: bytes) -> list[dict[str, str]]:
    pems = [part[part.index(b"-----BEGIN") :] + _END for part in chain.split(_END.strip()) if b"-----BEGIN" in part]
    return [_one(pem, x509.load_pem_x509_certificate(pem)) for pem in pems]


def _one(pem: bytes, certificate: x509.Certificate) -> dict[str, str]:
    return {
        "pem": base64.b64encode(pem).decode(),
        "serialNumber": str(certificate.serial_number),
        "validFrom": utc(moment(certificate, "not_valid_before"), "seconds"),
        "expirationTime": utc(moment(certificate, "not_valid_after"), "seconds"),
    }
