# SPDX-License-Identifier: Apache-2.0
"""The composition root of `sluice agent`: root joins the parts, the other modules build some of them."""

from __future__ import annotations

import resource
from collections.abc import Mapping

from agent.core.settings import Settings
from agent.sources.state.notes import Notes


def main(settings: Settings, version: str, origins: Mapping[str, str]) -> int:
    """Runs the agent; `origins` has the origin of each setting. Returns the exit code."""
    from agent.app.early import repair_noted  # what is captured is put right before the rest is loaded

    # Six descriptors per pod: its namespace, its nf_tables, route and sock_diag sockets, and those for notifications of
    # the first two; one more while connections from before its enrolment are left; for DNS one per interface, and one.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    state = Notes(settings.run_dir)
    repaired = repair_noted(settings, state)
    from agent.app import root

    return root.main(settings, version, origins, state, repaired)


__all__ = ["main"]
