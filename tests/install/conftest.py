# SPDX-License-Identifier: Apache-2.0
"""A node whose files are real, and everybody's to rewrite."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.installing import Node


@pytest.fixture
def node() -> Iterator[Node]:
    """In a short path: settings take no long ones."""
    with tempfile.TemporaryDirectory(prefix="slu-install-") as directory:
        yield Node(Path(directory) / "host")
