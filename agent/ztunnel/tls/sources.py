# SPDX-License-Identifier: Apache-2.0
"""Chooses where the credentials of this node's identities come from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from agent.core.errors import SettingsError
from agent.ztunnel.tls.contexts import Credentials
from agent.ztunnel.tls.spiffe import SpiffeId
from agent.ztunnel.ztunnel_settings import ZtunnelSettings

LOOK_SECONDS: Final = 1.0  # between two looks at the files of identities

log = logging.getLogger(__name__)


class CredentialsSource(Protocol):
    """Issues or reads credentials."""

    async def issue(self, identity: SpiffeId) -> Credentials:
        """Returns credentials of the identity. Raises SluiceError."""

    async def run(self) -> None:
        """Follows changes until cancelled."""


Changed = Callable[[SpiffeId], None]


def credentials_source(settings: ZtunnelSettings, changed: Changed) -> CredentialsSource:
    """Returns the source that the setting `identities` names; it calls `changed` when an identity has new credentials.

    Raises SettingsError or CredentialsError.
    """
    kind, _, place = settings.identities.partition(":")
    if kind == "development" and place:
        from agent.ztunnel.tls.development_ca import DevelopmentCa  # loads the library cryptography

        return _Development(DevelopmentCa(Path(place)).issue)
    if kind == "files" and place:
        return _Files(Path(place), changed)
    if kind == "istio" and place:
        from agent.ztunnel.control.istio_ca import IstioCa

        return IstioCa(
            address=place,
            roots=settings.ca_roots,
            other_name=settings.ca_name,
            token_file=Path(settings.token_file),
            cluster_id=settings.cluster_id,
            lifetime=settings.certificate_seconds,
            headers=settings.ca_headers,
        )
    if kind == "spiffe" and place:
        from agent.ztunnel.control.workload_api import WorkloadApi

        return WorkloadApi(place, changed)
    raise SettingsError(
        f"identities: {settings.identities!r} is not development:DIRECTORY, files:DIRECTORY, istio:URL or spiffe:URL"
    )


class _Development:
    def __init__(self, issue: Callable[[SpiffeId], Credentials]) -> None:
        self._issue = issue

    async def issue(self, identity: SpiffeId) -> Credentials:
        return self._issue(identity)

    async def run(self) -> None:
        """Waits until cancelled: the authority does not change."""
        await asyncio.Event().wait()


class _Files:
    """Looks at the files of each identity that was issued."""

    def __init__(self, directory: Path, changed: Changed) -> None:
        from agent.ztunnel.tls.file_identities import FileIdentities

        self._files = FileIdentities(directory)
        self._changed = changed
        self._seen: dict[SpiffeId, int] = {}

    async def issue(self, identity: SpiffeId) -> Credentials:
        self._seen[identity] = self._files.changed(identity)
        return self._files.read(identity)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for identity, seen in self._seen.items():
                if self._files.changed(identity) != seen:
                    self._changed(identity)
