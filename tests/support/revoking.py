# SPDX-License-Identifier: Apache-2.0
"""An authority of the test's own with intermediates below it, its certificates and revocation lists."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from agent.ztunnel.tls.contexts import Credentials
from agent.ztunnel.tls.spiffe import SpiffeId

HOUR = timedelta(hours=1)


def named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@dataclass
class Authority:
    """A key that signs certificates and lists; `above` is empty for a root."""

    name: str
    key: Any
    certificate: x509.Certificate
    above: tuple[Authority, ...] = ()

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return _pem(self.key)

    @property
    def root(self) -> Authority:
        return self.above[-1] if self.above else self

    def below(self, name: str, *, may_sign_lists: bool = True) -> Authority:
        """An intermediate authority."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _authority(name, key, self.name, self.key, may_sign_lists=may_sign_lists)
        return Authority(name, key, certificate, (self, *self.above))

    def issue(self, identity: SpiffeId, uris: Iterable[str] | None = None, life: timedelta = HOUR) -> Credentials:
        """Credentials; `uris` stand in place of the identity."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.UniformResourceIdentifier(uri) for uri in ([str(identity)] if uris is None else uris)]
        made = _unsigned("", key, self.name, life)
        if names:
            made = made.add_extension(x509.SubjectAlternativeName(names), critical=True)
        leaf = made.sign(self.key, hashes.SHA256())
        chain = [leaf.public_bytes(Encoding.PEM), *(one.pem for one in (self, *self.above)[:-1])]
        return Credentials(identity, key=_pem(key), chain=b"".join(chain), roots=self.root.pem)

    def revoke(self, *serials: int, until: timedelta = HOUR, extension: x509.ExtensionType | None = None) -> bytes:
        """A list as PEM."""
        now = datetime.now(UTC)
        made = x509.CertificateRevocationListBuilder().issuer_name(named(self.name))
        made = made.last_update(now - 2 * HOUR).next_update(now + until)
        for serial in serials:
            one = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - HOUR)
            made = made.add_revoked_certificate(one.build())
        if extension is not None:
            made = made.add_extension(extension, critical=True)
        return made.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def root(name: str = "root", *, by_rsa: bool = False) -> Authority:
    key = rsa.generate_private_key(65537, 2048) if by_rsa else ec.generate_private_key(ec.SECP256R1())
    return Authority(name, key, _authority(name, key, name, key))


def serial(credentials: Credentials) -> int:
    return x509.load_pem_x509_certificate(credentials.chain).serial_number


def ders(credentials: Credentials) -> list[bytes]:
    """The chain with its root, as a peer's is after its verification."""
    held = x509.load_pem_x509_certificates(credentials.chain + credentials.roots)
    return [one.public_bytes(Encoding.DER) for one in held]


def _pem(key: Any) -> bytes:
    made: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return made


def _unsigned(subject: str, key: Any, issuer: str, life: timedelta) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(named(subject) if subject else x509.Name([]))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * HOUR)
        .not_valid_after(now + life)
    )


def _authority(name: str, key: Any, issuer: str, signer: Any, *, may_sign_lists: bool = True) -> x509.Certificate:
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=may_sign_lists, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    made = _unsigned(name, key, issuer, timedelta(days=1))
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return made.add_extension(usage, critical=True).sign(signer, hashes.SHA256())


def write(directory: Path, credentials: Credentials) -> None:
    """Files as `--identities files:` reads them."""
    own = directory / credentials.identity.namespace / credentials.identity.service_account
    own.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("key", credentials.key),
        ("cert-chain", credentials.chain),
        ("root-cert", credentials.roots),
    ):
        (own / f"{name}.pem").write_bytes(content)
