# SPDX-License-Identifier: Apache-2.0
"""Certificate revocation lists (RFC 5280, 5): what is kept of them, and what they say of a chain. No IO.

A list counts only if its issuer, which is the next certificate of the chain, has signed it.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.x509.oid import SignatureAlgorithmOID

from agent.core.errors import SluiceError
from agent.ztunnel.tls.keys import moment

_BLOCK: Final = re.compile(rb"-----BEGIN X509 CRL-----([^-]*)-----END X509 CRL-----")
_UNDERSTOOD: Final = frozenset((x509.IssuingDistributionPoint.oid,))


class RevocationListError(SluiceError):
    """A list that cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationList:
    """A list without dates of entries. `place` is its file, `issuer` a name as DER, `digest` of the signed part."""

    place: str
    issuer: bytes
    serials: frozenset[int]
    expires: float
    hash: hashes.HashAlgorithm
    digest: bytes
    signature: bytes

    def is_signed_by(self, issuer: x509.Certificate) -> bool:
        """Returns True if the issuer has signed the list, and may sign lists."""
        key = issuer.public_key()
        try:
            if isinstance(key, ec.EllipticCurvePublicKey):
                key.verify(self.signature, self.digest, ec.ECDSA(Prehashed(self.hash)))
            elif isinstance(key, rsa.RSAPublicKey):
                key.verify(self.signature, self.digest, padding.PKCS1v15(), Prehashed(self.hash))
            else:
                return False
            return issuer.extensions.get_extension_for_class(x509.KeyUsage).value.crl_sign
        except InvalidSignature:
            return False
        except x509.ExtensionNotFound:
            return True  # without key usages a key may do everything


def parse(content: bytes, place: str) -> tuple[RevocationList, ...]:
    """Returns the lists of a file: PEM, or one as DER. An empty file has none. Raises RevocationListError."""
    try:
        if content[:1] == b"\x30":
            return (_read(content, place),)
        blocks = [base64.b64decode(block) for block in _BLOCK.findall(content)]
        if not blocks and content.strip():
            raise RevocationListError("neither PEM blocks of X509 CRL nor DER")
        return tuple(_read(block, place) for block in blocks)
    except (ValueError, UnsupportedAlgorithm, AttributeError) as error:  # the last: no nextUpdate, which RFC 5280 wants
        raise RevocationListError(f"it cannot be read: {error}") from None


def _read(der: bytes, place: str) -> RevocationList:
    read = x509.load_der_x509_crl(der)
    for extension in read.extensions:
        if extension.critical and extension.oid not in _UNDERSTOOD:  # a delta list is one, too
            raise RevocationListError(f"it has the critical extension {extension.oid.dotted_string}")
        if isinstance(extension.value, x509.IssuingDistributionPoint) and extension.value.indirect_crl:
            raise RevocationListError("it is an indirect list: its issuer is not that of the certificates")
    algorithm = read.signature_hash_algorithm
    if algorithm is None or read.signature_algorithm_oid == SignatureAlgorithmOID.RSASSA_PSS:
        raise RevocationListError("its signature is neither ECDSA nor RSA with PKCS#1 v1.5")
    return RevocationList(
        place=place,
        issuer=read.issuer.public_bytes(),
        serials=frozenset(entry.serial_number for entry in read),
        expires=moment(read, "next_update"),
        hash=algorithm,
        digest=hashlib.new(algorithm.name, _signed_part(der)).digest(),
        signature=read.signature,
    )


def _signed_part(der: bytes) -> bytes:
    """Returns the first element of a list that was read. The library encodes it again, 0.2 s for 100,000 entries."""
    start, _ = _content(der, 0)
    begin, size = _content(der, start)
    return der[start : begin + size]


def _content(der: bytes, at: int) -> tuple[int, int]:
    """Returns (place, size) of the content of the element at `at`."""
    size = der[at + 1]
    if size < 0x80:
        return at + 2, size
    begin = at + 2 + (size & 0x7F)
    return begin, int.from_bytes(der[at + 2 : begin], "big")


class Finding(NamedTuple):
    """The result for a chain: which certificate is revoked by which list, and which has no current list; or ""."""

    revoked: str = ""
    unknown: str = ""


class RevocationLists:
    """Lists by issuer."""

    def __init__(self, lists: Iterable[RevocationList] = ()) -> None:
        self._by_issuer: dict[bytes, list[RevocationList]] = {}
        self._signed: dict[tuple[bytes, bytes], bool] = {}  # by signature of the list and its issuer's certificate
        for one in lists:
            self._by_issuer.setdefault(one.issuer, []).append(one)

    def judge(self, chain: Sequence[bytes], now: float) -> Finding:
        """Looks up each certificate of a verified chain (DER, the peer's first) but the last, which is trusted.

        Raises ValueError: it cannot be read.
        """
        unknown = ""
        certificates = [x509.load_der_x509_certificate(each) for each in chain]
        for index, (certificate, issuer) in enumerate(itertools.pairwise(certificates)):
            name = certificate.issuer
            lists = [
                one
                for one in self._by_issuer.get(name.public_bytes(), ())
                if self._is_signed(one, issuer, chain[index + 1])
            ]
            for one in lists:
                if certificate.serial_number in one.serials:
                    what = f"certificate {certificate.serial_number:x} of {name.rfc4514_string()}"
                    return Finding(revoked=f"{what} is revoked by {one.place}")
            if not any(now < one.expires for one in lists):
                state = "every revocation list is expired" if lists else "no revocation list"
                unknown = unknown or f"{state} of {name.rfc4514_string()}"
        return Finding(unknown=unknown)

    def _is_signed(self, one: RevocationList, issuer: x509.Certificate, der: bytes) -> bool:
        key = one.signature, der
        if key not in self._signed:
            self._signed[key] = one.is_signed_by(issuer)
        return self._signed[key]
