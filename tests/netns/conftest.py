# SPDX-License-Identifier: Apache-2.0
"""What several files share: a pod with the embedded ztunnel, and a pod that eBPF programs redirect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ebpf_pod import Stage, forget, stage
from support.ztunnel import Lab, labs


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """Without a ztunnel yet."""
    with labs(tmp_path) as made:
        yield made


@pytest.fixture
def served(lab: Lab) -> Lab:
    lab.serve()
    return lab


@pytest.fixture(scope="module")
def shared() -> Iterator[Stage]:
    with stage() as made:
        yield made


@pytest.fixture
def node(shared: Stage) -> Iterator[Stage]:
    """Nothing of an earlier test is left waiting."""
    yield shared
    forget(shared)
