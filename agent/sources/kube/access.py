# SPDX-License-Identifier: Apache-2.0
"""The API server's address, the agent's token and the CA, from files that are replaced at run time.

The kubelet swaps a symbolic link when it renews a token (an hour of life, renewed after 80 % of it) or the CA.
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from agent.core.errors import KubeError
from agent.kernel.files import WatchedFile

_TOKEN = re.compile(r"[!-~]{1,65536}")  # it becomes a line of the request's head


class Access:
    """The token goes to https alone. Files are looked at with every request: one stat() each."""

    def __init__(self, server: str, token_file: str, ca_file: str) -> None:
        """Takes `server`, as https://10.96.0.1:443 or https://[fd00::1]:6443; without https no secret is sent.

        Raises KubeError if it is invalid.
        """
        try:
            parts = urlsplit(server)
            self.host = parts.hostname or ""
            self.port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise KubeError(f"API server {server!r}: {error}; check kube_server") from None
        if not self.host or parts.scheme not in ("http", "https"):
            raise KubeError(f"API server {server!r} is no URL like https://10.96.0.1:443; check kube_server")
        self.secure = parts.scheme == "https"
        self.authority = parts.netloc
        self._token_file = token_file
        self._ca_file = ca_file
        self._token = ""
        self._context: ssl.SSLContext | None = None
        self.refused()

    def refused(self) -> None:
        """Makes the next request read token and CA again, even if the files look unchanged."""
        self._tokens = WatchedFile(Path(self._token_file))
        self._authorities = WatchedFile(Path(self._ca_file))

    def token(self) -> str:
        """Returns the token, "" without https. Raises KubeError without any; an unreadable update is ignored."""
        if not self.secure:
            return ""
        try:
            text = (self._tokens.read() or "").strip()
        except (OSError, UnicodeDecodeError) as error:
            return self._older(str(error))
        if text and not _TOKEN.fullmatch(text):
            return self._older("holds no token")
        self._token = text or self._token
        return self._token or self._older("is not there or empty")

    def _older(self, why: str) -> str:
        if not self._token:
            raise KubeError(f"token file {self._token_file}: {why}; check kube_token_file")
        return self._token

    def context(self) -> ssl.SSLContext | None:
        """Returns the context; None without https, a new one after a change. Raises KubeError without a usable CA."""
        if not self.secure:
            return None
        try:
            if text := self._authorities.read():
                self._context = _context(text)
        except (OSError, UnicodeDecodeError, ssl.SSLError) as error:
            if self._context is None:
                self._authorities = WatchedFile(Path(self._ca_file))
                raise KubeError(f"CA file {self._ca_file}: {error}; check kube_ca_file") from None
        if self._context is None:
            raise KubeError(f"CA file {self._ca_file}: is not there or empty; check kube_ca_file")
        return self._context


def _context(authorities: str) -> ssl.SSLContext:
    """Returns a context that trusts these CAs alone, not the system's.

    Python 3.13 demands extensions that clusters' CAs lack (kubernetes_asyncio#349); chain, dates and name are checked.
    """
    context = ssl.create_default_context(cadata=authorities.encode("ascii", "ignore").decode())  # without comments
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context
