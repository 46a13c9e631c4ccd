# SPDX-License-Identifier: Apache-2.0
"""Removes the annotation ambient.istio.io/redirection from this node's pods at the end of an uninstallation."""

from __future__ import annotations

import argparse
import asyncio
import socket
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from agent.cli import settings_sources
from agent.core import names
from agent.core.errors import KubeError, SettingsError
from agent.core.settings import Settings
from agent.install.host_root import HostRoot
from agent.migration.istio_agent import RUN_DIR, theirs_runs

_REFUSED = (401, 403)  # the role is gone, and will not come back by waiting
_BY_HAND = f"do it by hand: kubectl annotate pods --all -A {names.REDIRECTION}-"


def take_back(config: str, captured: Collection[str], problems: list[str]) -> list[str]:
    """Removes the annotation of all pods of the node except the `captured` ones.

    `captured` has UIDs, "" for a pod with an unknown UID; `config` is the settings file. Returns lines for people; adds
    to `problems` what is worth another try.
    """
    given = argparse.Namespace(**{field.name: None for field in fields(Settings)} | {"config": config})
    try:
        settings = settings_sources.load(given)
        if settings.kube_server in ("", "none"):
            return []
        if other := theirs_runs(HostRoot(settings.host_root), [RUN_DIR], Path("/proc")):
            return [f"{names.REDIRECTION} stays on all pods: istio-cni's agent runs here ({other})"]
        if "" in captured:
            return [f"{names.REDIRECTION} stays on all pods: which of them are still captured is not known"]
        done = asyncio.run(_take_back(settings, captured))
    except KubeError as error:
        if error.status in _REFUSED:
            return [f"{names.REDIRECTION} stays on the pods: {error}; {_BY_HAND}"]
        problems.append(f"{names.REDIRECTION}: {error}")
        return []
    except SettingsError as error:
        problems.append(f"{names.REDIRECTION}: {error}")
        return []
    return [f"{names.REDIRECTION} taken back from {len(done)} pods"] if done else []


async def _take_back(settings: Settings, captured: Collection[str]) -> list[str]:
    from agent.sources.kube import annotating  # with TLS and all: only where there is a cluster
    from agent.sources.kube.access import Access
    from agent.sources.kube.api_client import Client

    client = Client(Access(settings.kube_server, settings.kube_token_file, settings.kube_ca_file))
    try:
        return await annotating.take_back(client, settings.node_name or socket.gethostname(), captured)
    finally:
        await client.close()
