# SPDX-License-Identifier: Apache-2.0
"""What the image has of the lock: what the agent runs with, hashed, and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

from support import chart


def printed(*options: str) -> dict[str, str]:
    """Name -> its part of the lock."""
    argv = [sys.executable, str(chart.ROOT / "deploy/image/runtime-lock"), *options]
    out = subprocess.run(argv, cwd=chart.ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    parts = [part for part in re.split(r"^(?=[A-Za-z0-9])", out, flags=re.MULTILINE) if part]
    return {part.partition("==")[0]: part for part in parts}


def test_the_image_gets_what_the_agent_depends_on_and_no_more() -> None:
    project = tomllib.loads((chart.ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[^A-Za-z0-9-]", one)[0].lower() for one in project["dependencies"]}
    needed = {"cffi", "pycparser"}, {"hpack", "hyperframe"}, {"multidict"}  # by cryptography, h2 and grpclib
    assert set(printed()) == wanted.union(*needed)
    assert all("--hash=sha256:" in part for part in printed().values())


def test_the_wheel_is_built_with_what_the_project_says() -> None:
    asked = {
        line.partition(">")[0].strip() for line in (chart.ROOT / "tools/build.in").read_text().splitlines() if line
    }
    assert asked <= set(printed("--build"))
