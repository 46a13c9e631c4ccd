# SPDX-License-Identifier: Apache-2.0
"""TLS 1.3 by GnuTLS (libgnutls, through ctypes): a stack other than the product's OpenSSL."""

from __future__ import annotations

import ctypes
import select
import socket
import time
from ctypes import byref, c_char_p, c_size_t, c_ssize_t, c_uint, c_void_p

from agent.ztunnel.tls.contexts import Credentials

SERVER, CLIENT = 1, 2  # gnutls_init
_X509_PEM = 1
_CREDENTIALS_CERTIFICATE = 1
_REQUIRE = 2  # gnutls_certificate_server_set_request
_ALPN_MANDATORY = 1
_AGAIN, _INTERRUPTED, _PREMATURE, _RESET = -28, -52, -110, -54
_HANDSHAKE_MILLISECONDS = 20_000

_library = ctypes.CDLL("libgnutls.so.30")
_library.gnutls_strerror.restype = c_char_p
_library.gnutls_certificate_get_peers.restype = c_void_p
for _name in ("gnutls_record_send", "gnutls_record_recv"):
    getattr(_library, _name).restype = c_ssize_t
    getattr(_library, _name).argtypes = [c_void_p, c_char_p, c_size_t]


class GnuTlsError(Exception):
    pass


class _Datum(ctypes.Structure):
    _fields_ = (("data", c_char_p), ("size", c_uint))


class _RawDatum(ctypes.Structure):
    """As it is returned: bytes that may hold zeros."""

    _fields_ = (("data", c_void_p), ("size", c_uint))


def _datum(data: bytes) -> _Datum:
    return _Datum(data, len(data))


def _call(name: str, *arguments: object) -> int:
    code: int = getattr(_library, name)(*arguments)
    if code < 0:
        raise GnuTlsError(f"{name}: {_library.gnutls_strerror(code).decode()}")
    return code


class GnuTls:
    """One session over a connected socket: both sides show certificates, ALPN is h2."""

    def __init__(self, link: socket.socket, role: int, credentials: Credentials) -> None:
        """Shakes hands. Raises GnuTlsError; the link is then closed."""
        self.link = link
        link.settimeout(None)
        self._session, self._held = c_void_p(), c_void_p()
        self._protocol = _datum(b"h2")
        _call("gnutls_certificate_allocate_credentials", byref(self._held))
        _call("gnutls_init", byref(self._session), c_uint(role))
        try:
            self._set(role, credentials)
            _call("gnutls_handshake", self._session)
        except GnuTlsError:
            self.close()
            raise
        self.peer = self._peer()

    def _set(self, role: int, credentials: Credentials) -> None:
        pem = _X509_PEM
        _call("gnutls_certificate_set_x509_trust_mem", self._held, byref(_datum(credentials.roots)), pem)
        chain, key = _datum(credentials.chain), _datum(credentials.key)
        _call("gnutls_certificate_set_x509_key_mem", self._held, byref(chain), byref(key), pem)
        _call("gnutls_priority_set_direct", self._session, b"NORMAL:-VERS-ALL:+VERS-TLS1.3", None)
        _call("gnutls_credentials_set", self._session, _CREDENTIALS_CERTIFICATE, self._held)
        _call("gnutls_alpn_set_protocols", self._session, byref(self._protocol), c_uint(1), c_uint(_ALPN_MANDATORY))
        if role == SERVER:
            _library.gnutls_certificate_server_set_request(self._session, _REQUIRE)
        _library.gnutls_handshake_set_timeout(self._session, c_uint(_HANDSHAKE_MILLISECONDS))
        _library.gnutls_transport_set_int2(self._session, self.link.fileno(), self.link.fileno())

    def _peer(self) -> bytes:
        """The other side's own certificate as DER, once its chain has been verified."""
        status = c_uint()
        _call("gnutls_certificate_verify_peers2", self._session, byref(status))
        if status.value:
            raise GnuTlsError(f"the peer's certificate is not valid: status {status.value:#x}")
        count = c_uint()
        found = ctypes.cast(
            _library.gnutls_certificate_get_peers(self._session, byref(count)), ctypes.POINTER(_RawDatum)
        )
        return ctypes.string_at(found[0].data, found[0].size)

    def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            sent = _library.gnutls_record_send(self._session, bytes(rest[: 1 << 14]), min(len(rest), 1 << 14))
            if sent < 0 and sent not in (_AGAIN, _INTERRUPTED):
                raise GnuTlsError(_library.gnutls_strerror(int(sent)).decode())
            rest = rest[max(0, sent) :]

    def receive(self, seconds: float) -> bytes | None:
        """Some bytes; b"" at the end of the session, also at one without a close_notify; None after `seconds`."""
        until = time.monotonic() + seconds
        buffer = ctypes.create_string_buffer(1 << 16)
        while True:
            pending = _library.gnutls_record_check_pending(self._session)
            if not pending and not select.select([self.link], [], [], max(0.0, until - time.monotonic()))[0]:
                return None
            taken = _library.gnutls_record_recv(self._session, buffer, len(buffer))
            if taken >= 0:
                return buffer.raw[:taken]
            if taken in (_PREMATURE, _RESET):
                return b""
            if taken not in (_AGAIN, _INTERRUPTED):  # e.g. a session ticket came alone
                raise GnuTlsError(_library.gnutls_strerror(int(taken)).decode())

    def close(self) -> None:
        if self._session:
            _library.gnutls_deinit(self._session)
            _library.gnutls_certificate_free_credentials(self._held)
            self._session = c_void_p()
        self.link.close()
