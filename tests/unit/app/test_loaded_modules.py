# SPDX-License-Identifier: Apache-2.0
"""What the daemon loads costs start and memory, and what its first step loads delays the repair of noted pods."""

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

# Of the daemon without a cluster.
NEVER = ("pyroute2", "psutil", "h2", "cryptography", "agent.ztunnel", "agent.lab", "agent.diagnosis",
         "agent.migration", "agent.sources.kube", "agent.install.installer")  # fmt: skip


def _loaded(script: str) -> list[str]:
    full = f"import sys\n{script}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", full], cwd=REPO, capture_output=True, text=True, check=True)
    return done.stdout.split()


def _below(loaded: list[str], *unwanted: str) -> list[str]:
    return [name for name in loaded if any(f"{name}.".startswith(f"{one}.") for one in unwanted)]


@pytest.mark.parametrize("backend", OTHERS)
def test_the_first_step_loads_only_the_recorded_backend(backend: str) -> None:
    loaded = _loaded(
        "import agent.cli.agent, agent.app.early\n"
        "from agent.backends.choose import LAYERS\n"
        "from agent.backends.registry import mechanisms\n"
        f"assert tuple(mechanisms(LAYERS[{backend!r}])) == LAYERS[{backend!r}]"
    )
    assert _below(loaded, *LATER, *OTHERS[backend]) == []


def test_the_daemon_loads_no_more_than_it_uses() -> None:
    loaded = _loaded("import agent.cli.agent, agent.app.root")
    assert _below(loaded, *NEVER) == []
