# SPDX-License-Identifier: Apache-2.0
"""Imitates a reboot: runtime, primary CNI, pods, ztunnel and agent begin in several orders.

`sluice verify --all` reports the state at each step: 2 while no agent runs, 1 without a ztunnel, 0 as soon as both are
there. tests/cri/test_reboot.py shows that no pod runs uncaptured in any order.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest
from support.node import until
from support.rehearsal import PATIENCE, SERVER, Node, node

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]
ORDERS = (
    ("primary", "containerd", "pods", "ztunnel", "agent"),
    ("agent", "ztunnel", "primary", "containerd", "pods"),
    ("containerd", "pods", "agent", "primary", "ztunnel"),
    ("ztunnel", "containerd", "agent", "pods", "primary"),
)
UNITS = {"containerd": "containerd", "ztunnel": "sluice-ztunnel", "agent": "sluice"}


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with node("sluao") as made:
        made.run("shop/web", SERVER)
        made.right()
        made.on(f"systemctl disable {' '.join(UNITS.values())}")
        yield made


class Pods(threading.Thread):
    """What the kubelet does about its pods: ends what the runtime remembers, then tries until each runs."""

    def __init__(self, here: Node) -> None:
        super().__init__(daemon=True)
        self.here, self.address = here, ""
        self.start()

    def run(self) -> None:
        until(lambda: self.here.code("pod stop --all") == 0, "the runtime answers", PATIENCE)
        done = self.here.machine.on(f"pod run shop/web --enrolled --seconds 60 -- {SERVER}", check=False, seconds=90)
        self.address = done.stdout.strip()


def expected(begun: set[str]) -> int:
    return 2 if "agent" not in begun else 0 if "ztunnel" in begun else 1


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_verify_after_each_step(here: Node, order: tuple[str, ...]) -> None:
    here.machine.power_off()
    here.machine.boot()
    begun, pods = set[str](), None
    for step in order:
        if step == "pods":
            pods = Pods(here)
        elif step == "primary":
            value = json.loads(here.on("cat /etc/cni/net.d/10-lab.conflist"))
            value["plugins"] = [value["plugins"][0], {"type": "tuning", "mtu": 1400 + ORDERS.index(order)}]
            here.put("/etc/cni/net.d/10-lab.conflist", json.dumps(value))
        else:
            here.on(f"systemctl start {UNITS[step]}")
        begun.add(step)
        wanted = expected(begun)
        until(lambda wanted=wanted: here.verify().code == wanted, f"verify ends with {wanted} after {step}", PATIENCE)
        assert wanted != 1 or "(ztunnel)" in here.verify().wrong
    assert pods is not None
    pods.join(90)
    assert pods.address
    here.right()
    assert here.verify().rows["shop/web"]["state"] == "enabled"
    until(here.wrapped, "our list wraps the primary one", PATIENCE)
