# SPDX-License-Identifier: Apache-2.0
"""Chooses where the credentials of this node's identities come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agent.core.errors import SettingsError
from agent.ztunnel.tls.contexts import Credentials
from agent.ztunnel.tls.spiffe import SpiffeId


def credentials_source(setting: str) -> Callable[[SpiffeId], Credentials]:
    """Returns the function that issues or reads credentials; it raises CredentialsError.

    `setting` is development:DIRECTORY or files:DIRECTORY. Raises SettingsError or CredentialsError.
    """
    kind, _, place = setting.partition(":")
    if kind == "development" and place:
        from agent.ztunnel.tls.development_ca import DevelopmentCa  # loads the library cryptography

        return DevelopmentCa(Path(place)).issue
    if kind == "files" and place:
        from agent.ztunnel.tls.file_identities import FileIdentities

        return FileIdentities(Path(place)).read
    raise SettingsError(f"identities: {setting!r} is neither development:DIRECTORY nor files:DIRECTORY")
