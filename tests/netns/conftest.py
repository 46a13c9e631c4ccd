# SPDX-License-Identifier: Apache-2.0
"""A pod and its peer with the embedded ztunnel between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
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
