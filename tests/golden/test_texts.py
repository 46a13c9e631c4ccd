# SPDX-License-Identifier: Apache-2.0
"""What is generated from the code is as the code is. SLUICE_GOLDEN=write writes it anew; read the difference then."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
TEXTS = {"man": "docs/man/sluice.1", "cli": "docs/cli.md", "settings": "docs/settings.md", "api": "docs/api.md"}


def made(which: str) -> str:
    argv = [sys.executable, REPO / "tools/man", which]
    return subprocess.run(argv, capture_output=True, text=True, check=True, cwd=REPO).stdout


@pytest.mark.parametrize("which", TEXTS)
def test_generated_texts_are_current(which: str) -> None:
    text, path = made(which), REPO / TEXTS[which]
    if os.environ.get("SLUICE_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{TEXTS[which]} is out of date: run tools/man, and read the difference"


def test_the_page_of_the_api_has_every_path() -> None:
    code = (REPO / "agent/export/admin.py").read_text()
    paths = set(re.findall(r'"(/(?:v1/\w+|metrics|healthz|readyz))"', code))
    paths |= {f"/debug/{name}" for name in ("pods", "explain", "connections")}
    page = (REPO / TEXTS["api"]).read_text()
    assert len(paths) >= 11
    assert {path for path in paths if f"{path}`" not in page and f" {path}\n" not in page} == set()


def test_they_are_the_same_whatever_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = made("cli")
    for name, value in (("SLUICE_RUN_DIR", "/x"), ("SLUICE_CONFIG", "/y"), ("COLUMNS", "40")):
        monkeypatch.setenv(name, value)
    assert made("cli") == before


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
def test_the_manual_page_is_one() -> None:
    argv = ["mandoc", "-T", "lint", "-W", "warning", REPO / TEXTS["man"]]
    assert subprocess.run(argv, capture_output=True, text=True, check=False).stdout == ""
