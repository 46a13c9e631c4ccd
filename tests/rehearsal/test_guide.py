# SPDX-License-Identifier: Apache-2.0
"""The guided script to its end, over three containerd nodes in namespaces; its page in docs is of the guide of now."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
from types import ModuleType

import pytest
from support.rehearsalnodes import REPO, dist, machines, previous

TRANSCRIPT = REPO / "build/transcripts/guide-namespaces.txt"
SECONDS = 500  # far more than it takes: two minutes on an idle machine


def transcripts() -> ModuleType:
    """tools/transcript as a module."""
    loader = importlib.machinery.SourceFileLoader("transcript", str(REPO / "tools/transcript"))
    spec = importlib.util.spec_from_loader("transcript", loader)
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    loader.exec_module(made)
    return made


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 100)
def test_guide() -> None:
    archives = {"GUIDE_ARCHIVE": str(dist()), "GUIDE_PREVIOUS": str(previous())}
    TRANSCRIPT.parent.mkdir(parents=True, exist_ok=True)
    with machines("slua") as made, TRANSCRIPT.open("w") as out:
        environment = {**os.environ, **archives, "GUIDE_ON": str(made.base / "bin/on")}
        argv = ["bash", str(REPO / "vagrant/guide/guide.sh")]
        done = subprocess.run(argv, env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=SECONDS)
        assert made.failure is None
    text = TRANSCRIPT.read_text()
    assert done.returncode == 0, text[-6000:]
    steps = transcripts().steps
    assert steps(text) == steps((REPO / "docs/transcript-guide.md").read_text()), "run tools/transcript"
