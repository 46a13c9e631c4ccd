# SPDX-License-Identifier: Apache-2.0
"""A real containerd whose directory is removed and made again: it is blind, and `sluice doctor` sees that (P26)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.crinode import CriNode, crinode, until

from agent.diagnosis.probes.cni import _watched
from agent.install.runtime import Running

pytestmark = pytest.mark.root


@pytest.fixture
def here() -> Iterator[CriNode]:
    with crinode("slucr") as made:
        made.start_containerd()
        made.primary()
        until(lambda: made.load_status() == "OK", "the runtime has the list")
        yield made


def test_p26_a_runtime_that_is_blind_is_told_until_it_is_restarted(here: CriNode) -> None:
    def watched() -> bool | None:
        return _watched(Running(here.pid("containerd"), "containerd"), here.path("/etc/cni/net.d"), Path("/proc"))

    assert watched() is True
    directory = here.path("/etc/cni/net.d")
    kept = {path.name: path.read_bytes() for path in directory.iterdir()}
    shutil.rmtree(directory)
    until(lambda: here.load_status() != "OK", "the runtime says that it has no list")
    directory.mkdir()
    for name, data in kept.items():
        (directory / name).write_bytes(data)
    assert watched() is False
    here.host.kill_containerd()
    here.start_containerd()
    until(lambda: here.load_status() == "OK", "the runtime has the list again")
    assert watched() is True
