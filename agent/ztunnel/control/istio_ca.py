# SPDX-License-Identifier: Apache-2.0
"""Certificates from Istio's CA: IstioCertificateService/CreateCertificate, one key and request per identity.

The token is read at each call, because kubelet replaces it. The CA signs for a pod's identity only if it lets this
ztunnel impersonate it, which the request names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from agent.core.errors import ProtocolError
from agent.core.wire import protobuf
from agent.ztunnel.control import grpc_channel
from agent.ztunnel.control.grpc_channel import ControlPlaneError
from agent.ztunnel.tls.contexts import Credentials, CredentialsError
from agent.ztunnel.tls.keys import key_pem
from agent.ztunnel.tls.spiffe import SpiffeId

METHOD: Final = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
_SECONDS: Final = 10.0


class IstioCa:
    """Asks the CA at `address` (see grpc_channel)."""

    def __init__(
        self,
        *,
        address: str,
        roots: str,
        other_name: str = "",
        token_file: Path,
        cluster_id: str,
        lifetime: int,
        headers: Mapping[str, str],
    ) -> None:
        """Takes the certificates' `lifetime` in seconds, and `headers` that are sent with each request."""
        self._address = address
        self._roots = roots
        self._other_name = other_name
        self._token_file = token_file
        self._cluster_id = cluster_id
        self._lifetime = lifetime
        self._headers = headers

    async def issue(self, identity: SpiffeId) -> Credentials:
        """Returns a new key and certificate of the identity. Raises CredentialsError or ControlPlaneError."""
        key = ec.generate_private_key(ec.SECP256R1())
        request = self._request(identity, key)
        channel = grpc_channel.channel(self._address, self._roots, self._other_name)
        try:
            response = await grpc_channel.call(channel, METHOD, request, self._metadata(), _SECONDS)
        finally:
            channel.close()
        try:
            chain = protobuf.Message(response).texts(1)
        except ProtocolError as error:
            raise ControlPlaneError(f"{METHOD}: {error}") from None
        if len(chain) < 2:
            raise CredentialsError(f"the CA sent {len(chain)} certificates for {identity}; a root is needed as well")
        own = "".join(f"{part.strip()}\n" for part in chain[:-1])
        return Credentials(identity, key_pem(key), own.encode(), chain[-1].encode())

    async def run(self) -> None:
        """Waits until cancelled: the CA is asked when a certificate is needed."""
        await asyncio.Event().wait()

    def _request(self, identity: SpiffeId, key: ec.EllipticCurvePrivateKey) -> bytes:
        name = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))])
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([]))
            .add_extension(name, critical=True)
            .sign(key, hashes.SHA256())
        )
        value = protobuf.text(3, str(identity))  # google.protobuf.Value.string_value
        field = protobuf.text(1, "ImpersonatedIdentity") + protobuf.embedded(2, value)
        return (
            protobuf.text(1, request.public_bytes(Encoding.PEM).decode())
            + protobuf.number(3, self._lifetime)
            + protobuf.embedded(4, protobuf.embedded(1, field))
        )

    def _metadata(self) -> dict[str, str]:
        try:
            token = self._token_file.read_text()
        except OSError as error:
            raise CredentialsError(f"token {self._token_file}: {error.strerror}") from None
        return grpc_channel.istio_metadata(self._headers, self._cluster_id, token)
