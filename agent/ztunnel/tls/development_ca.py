# SPDX-License-Identifier: Apache-2.0
"""A certificate authority for labs and tests: every process that may read the key in its directory is the CA.

It is used only where a setting names its directory. Several processes may share one directory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.ztunnel.tls.contexts import Credentials, CredentialsError
from agent.ztunnel.tls.keys import key_pem
from agent.ztunnel.tls.spiffe import SpiffeId

CA_FILE: Final = "development-ca.pem"  # key and certificate
LIFETIME: Final = timedelta(hours=24)
_ROOT_LIFETIME: Final = timedelta(days=3650)
_CLOCK_SKEW: Final = timedelta(minutes=2)
_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"


class DevelopmentCa:
    """Issues certificates with the key in `directory`, which it makes on first use (mode 0600)."""

    def __init__(self, directory: Path, lifetime: timedelta = LIFETIME) -> None:
        """Raises CredentialsError."""
        self._lifetime = lifetime
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (directory / CA_FILE).exists():
                _create(directory)
            held = (directory / CA_FILE).read_bytes()
            key = serialization.load_pem_private_key(held, None)
            self._root = x509.load_pem_x509_certificate(held[held.index(_CERTIFICATE) :])
        except (OSError, ValueError, TypeError) as error:
            raise CredentialsError(f"the development CA in {directory} cannot be used: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise CredentialsError(f"the key of the development CA in {directory} is not an elliptic curve key")
        self._key = key
        self.roots = self._root.public_bytes(serialization.Encoding.PEM)

    def issue(self, identity: SpiffeId) -> Credentials:
        """Returns a new key and certificate of the identity."""
        key = ec.generate_private_key(ec.SECP256R1())
        return Credentials(identity, key_pem(key), self.sign(identity, key.public_key()), roots=self.roots)

    def sign(self, identity: SpiffeId, key: CertificatePublicKeyTypes) -> bytes:
        """Returns a certificate as PEM."""
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))])
        certificate = (
            _builder(x509.Name([]), self._root.subject, key, self._lifetime)
            .add_extension(names, critical=True)
            .add_extension(usages, critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def revocation_list(self, serials: Iterable[int]) -> bytes:
        """Returns a list of revoked certificates as PEM."""
        now = datetime.now(UTC)
        made = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._root.subject)
            .last_update(now - _CLOCK_SKEW)
            .next_update(now + self._lifetime)
        )
        for serial in serials:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - _CLOCK_SKEW)
            made = made.add_revoked_certificate(entry.build())
        return made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _create(directory: Path) -> None:
    """Makes key and root. Of several processes the first one wins."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Sluice development CA")])
    root = (
        _builder(name, name, key.public_key(), _ROOT_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_ca_usage(), critical=True)
        .sign(key, hashes.SHA256())
    )
    fresh = directory / f".{CA_FILE}.{os.getpid()}"
    fresh.touch(mode=0o600)
    fresh.write_bytes(key_pem(key) + root.public_bytes(serialization.Encoding.PEM))
    with contextlib.suppress(FileExistsError):
        os.link(fresh, directory / CA_FILE)
    fresh.unlink()


def _builder(
    subject: x509.Name, issuer: x509.Name, key: CertificatePublicKeyTypes, lifetime: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + lifetime)
    )


def _ca_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
