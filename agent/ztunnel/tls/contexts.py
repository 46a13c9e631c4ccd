# SPDX-License-Identifier: Apache-2.0
"""TLS contexts of the identities of this node: TLS 1.3, ALPN h2, certificates on both sides.

A context is replaced when its certificate is renewed; sessions that were made with the previous one go on.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from agent.core.errors import SluiceError
from agent.ztunnel.tls.spiffe import SpiffeId


class CredentialsError(SluiceError):
    """A key or certificate that cannot be used."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A key and its certificates as PEM. `chain` begins with the identity's own; `roots` are those it trusts."""

    identity: SpiffeId
    key: bytes
    chain: bytes
    roots: bytes


@dataclass(frozen=True, slots=True)
class TlsContexts:
    """The contexts of one identity."""

    client: ssl.SSLContext
    server: ssl.SSLContext


def make_contexts(credentials: Credentials) -> TlsContexts:
    """Returns the contexts of both ends. Raises CredentialsError."""
    try:
        return TlsContexts(
            _context(ssl.PROTOCOL_TLS_CLIENT, credentials), _context(ssl.PROTOCOL_TLS_SERVER, credentials)
        )
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise CredentialsError(f"the credentials of {credentials.identity} cannot be used: {error}") from None


def _context(protocol: int, credentials: Credentials) -> ssl.SSLContext:
    made = ssl.SSLContext(protocol)
    made.check_hostname = False  # identities are URIs: see peer_checks
    made.verify_mode = ssl.CERT_REQUIRED
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.set_alpn_protocols(["h2"])
    # A root may be an intermediate certificate of another CA.
    made.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    made.load_verify_locations(cadata=credentials.roots.decode("ascii"))
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        made.num_tickets = 0  # sessions are not resumed
    # OpenSSL's Python module reads keys from files alone; this one is in memory.
    descriptor = os.memfd_create("credentials", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, credentials.key + b"\n" + credentials.chain)
        made.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return made


class ContextStore:
    """The contexts that this process holds, by identity. `ask` requests credentials, which come by `put`."""

    def __init__(self, ask: Callable[[SpiffeId], None]) -> None:
        self._ask = ask
        self._held: dict[SpiffeId, TlsContexts] = {}
        self._waiting: dict[SpiffeId, dict[Callable[[], None], None]] = {}

    def get(self, identity: SpiffeId) -> TlsContexts | None:
        """Returns the contexts; None if the identity has no credentials yet, which are then requested."""
        found = self._held.get(identity)
        if found is None and identity not in self._waiting:
            self._waiting[identity] = {}
            self._ask(identity)
            found = self._held.get(identity)
        return found

    def wait(self, identity: SpiffeId, ready: Callable[[], None]) -> None:
        """Calls `ready` once the identity has contexts; call it only after `get` returned None.

        The same `ready` is called once, however often it was given.
        """
        self._waiting.setdefault(identity, {})[ready] = None

    def put(self, credentials: Credentials) -> None:
        """Raises CredentialsError, and keeps the previous contexts then."""
        self._held[credentials.identity] = make_contexts(credentials)
        for ready in self._waiting.pop(credentials.identity, ()):
            ready()

    def drop(self, identity: SpiffeId) -> None:
        """Forgets an identity that no pod of this node has any more."""
        self._held.pop(identity, None)
        with contextlib.suppress(KeyError):
            del self._waiting[identity]
