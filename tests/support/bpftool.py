# SPDX-License-Identifier: Apache-2.0
"""bpftool as an independent reader of programs, maps, links and BTF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agent.kernel.exec import run


def shown(*words: str, netns: Path | None = None) -> Any:
    """What it says, as JSON. Debian 13's ends with 255 after a right answer, so the answer alone counts."""
    done = run(["bpftool", "-j", *words], netns=netns, check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise AssertionError(f"bpftool {' '.join(words)}: exit {done.returncode}, {done.stdout}{done.stderr}") from None
