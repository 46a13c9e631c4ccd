# SPDX-License-Identifier: Apache-2.0
"""The composition root of `sluice agent`: root joins the parts, the other modules build some of them."""

from __future__ import annotations

from collections.abc import Mapping

from agent.core.settings import Settings
from agent.sources.state.notes import Notes


def main(settings: Settings, version: str, origins: Mapping[str, str]) -> int:
    """Runs the agent; `origins` has the origin of each setting. Returns the exit code."""
    from agent.app.early import repair_noted  # what is captured is put right before the rest is loaded

    state = Notes(settings.run_dir)
    repair_noted(settings, state)
    from agent.app import root

    return root.main(settings, version, origins, state)


__all__ = ["main"]
