# SPDX-License-Identifier: Apache-2.0
"""Credentials from files, under the names that Istio's agents give them.

`DIRECTORY/NAMESPACE/SERVICE-ACCOUNT/` has cert-chain.pem, key.pem and root-cert.pem; a root-cert.pem in `DIRECTORY`
itself serves identities that have none of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from agent.ztunnel.tls.contexts import Credentials, CredentialsError
from agent.ztunnel.tls.spiffe import SpiffeId

CHAIN_FILE: Final = "cert-chain.pem"
KEY_FILE: Final = "key.pem"
ROOT_FILE: Final = "root-cert.pem"


class FileIdentities:
    """Reads the files of `directory` at each call."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, identity: SpiffeId) -> Credentials:
        """Returns what the files hold now. Raises CredentialsError."""
        own = self._directory / identity.namespace / identity.service_account
        if not own.resolve().is_relative_to(self._directory.resolve()):
            raise CredentialsError(f"{identity} leads out of {self._directory}")
        try:
            chain = (own / CHAIN_FILE).read_bytes()
            key = (own / KEY_FILE).read_bytes()
            roots = own / ROOT_FILE
            held = (roots if roots.exists() else self._directory / ROOT_FILE).read_bytes()
        except OSError as error:
            raise CredentialsError(f"no credentials of {identity}: {error.filename}: {error.strerror}") from None
        return Credentials(identity, key=key, chain=chain, roots=held)

    def changed(self, identity: SpiffeId) -> int:
        """Returns a number that differs after the identity's certificate or key has been replaced; 0 without files."""
        own = self._directory / identity.namespace / identity.service_account
        try:
            return max((own / name).stat().st_mtime_ns for name in (CHAIN_FILE, KEY_FILE))
        except OSError:
            return 0
