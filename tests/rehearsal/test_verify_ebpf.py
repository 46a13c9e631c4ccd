# SPDX-License-Identifier: Apache-2.0
"""Backend ebpf: a program of the node that somebody detached is told of each captured pod, and by nothing else."""

from __future__ import annotations

import pytest
from support.node import until
from support.rehearsal import PATIENCE, SERVER, node

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]
PROGRAM = "/sys/fs/bpf/sluice/v1/links/connect4"


def test_a_program_of_the_node_is_detached() -> None:
    with node("sluae", backend="ebpf", verify_seconds=3000.0) as here:
        here.run("shop/web", SERVER)
        here.right()
        until(here.left_alone, "the agent has looked at it for the last time", PATIENCE)
        here.on(f"bpftool link detach pinned {PROGRAM}")
        found = here.verify()
        assert found.code == 1 and found.wrong.keys() == {"shop/web"}, found.table
        assert found.wrong["shop/web"].startswith("ebpf-programs: connect4 is detached"), found.table
        assert here.verify("--repair").code == 0
        assert here.verify().wrong == {}
