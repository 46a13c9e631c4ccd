# SPDX-License-Identifier: Apache-2.0
"""The first step of a start loads only what repairs noted pods: what it loads delays the repair."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[3]
OTHERS = {
    "nftables": ("agent.backends.iptables", "agent.backends.ebpf"),
    "iptables": ("agent.backends.nftables", "agent.backends.ebpf"),
    "ebpf": ("agent.backends.nftables", "agent.backends.iptables"),
}
LATER = ("asyncio", "concurrent", "ssl", "yaml", "prometheus_client", "http", "agent.app.root", "agent.flows",
         "agent.zds", "agent.export", "agent.sources.kube", "agent.sources.netns.search", "agent.backends.syn_probe",
         "agent.reconciler.interfaces")  # fmt: skip


@pytest.mark.parametrize("backend", OTHERS)
def test_it_loads_only_the_recorded_backend(backend: str) -> None:
    script = (
        "import sys, agent.cli.agent, agent.app.early\n"
        "from agent.backends.choose import LAYERS\n"
        "from agent.backends.registry import mechanisms\n"
        f"assert tuple(mechanisms(LAYERS[{backend!r}])) == LAYERS[{backend!r}]\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=True)
    unwanted = (*LATER, *OTHERS[backend])
    loaded = done.stdout.split()
    assert [name for name in loaded if any(f"{name}.".startswith(f"{one}.") for one in unwanted)] == []
