# SPDX-License-Identifier: Apache-2.0
"""Keys and certificates as PEM, and what is read from a certificate before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from agent.ztunnel.tls.contexts import Credentials, CredentialsError
from agent.ztunnel.tls.spiffe import parse


@dataclass(frozen=True, slots=True)
class Validity:
    """Seconds since 1970."""

    begin: float
    end: float

    @property
    def half(self) -> float:
        """Returns the time for renewal."""
        return (self.begin + self.end) / 2


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def validity(credentials: Credentials) -> Validity:
    """Checks that the certificate belongs to the key and the identity, and returns its validity.

    Raises CredentialsError: a CA that answers with another identity's certificate is not believed.
    """
    try:
        certificate = x509.load_pem_x509_certificate(credentials.chain)
        key = load_pem_private_key(credentials.key, None)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, TypeError, x509.ExtensionNotFound) as error:
        raise CredentialsError(f"the certificate of {credentials.identity} cannot be read: {error}") from None
    identities = [parse(uri) for uri in names.get_values_for_type(x509.UniformResourceIdentifier)]
    if credentials.identity not in identities:
        found = ", ".join(str(one) for one in identities if one) or "no SPIFFE identity"
        raise CredentialsError(f"the certificate for {credentials.identity} is of {found}")
    if _public(key.public_key()) != _public(certificate.public_key()):
        raise CredentialsError(f"the certificate of {credentials.identity} belongs to another key")
    return Validity(moment(certificate, "not_valid_before"), moment(certificate, "not_valid_after"))


def _public(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def moment(signed: x509.Certificate | x509.CertificateRevocationList, name: str) -> float:
    """Returns one of its times, such as not_valid_after or next_update, in seconds since 1970."""
    # Debian 12's cryptography has only the form without a time zone, newer ones warn about it.
    found = getattr(signed, f"{name}_utc", None)
    return float((found or getattr(signed, name).replace(tzinfo=UTC)).timestamp())
