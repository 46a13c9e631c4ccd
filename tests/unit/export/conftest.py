# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from support.surroundings import PROGRAM


@pytest.fixture(autouse=True)
def one_foreign_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the path of every pod."""
    monkeypatch.setattr("agent.sources.pathprograms.others", lambda target: (PROGRAM,))
