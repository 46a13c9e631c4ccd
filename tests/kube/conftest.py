# SPDX-License-Identifier: Apache-2.0
"""An API server in a thread for each test; its CA and certificate are made once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import apiserver_files
from support.apiserver import ApiServer


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("authority")
    apiserver_files.authority(directory)
    apiserver_files.certificate(directory)
    return directory


@pytest.fixture
def server(authority: Path, tmp_path: Path) -> Iterator[ApiServer]:
    shutil.copytree(authority, tmp_path / "server")
    with ApiServer(tmp_path / "server") as running:
        yield running
