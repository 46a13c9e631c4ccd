# SPDX-License-Identifier: Apache-2.0
"""What an earlier agent noted is put right at the first moment of a start, by notes and record alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import bpftool
from support.ebpf_agents import agent
from support.ebpf_pod import APP, PEER, POD, accepted, carries, from_client, stage, waiting
from support.rules import pod

from agent.app.early import repair_noted
from agent.backends.choose import LAYERS, Recorded
from agent.core.model.pods import Pod
from agent.core.model.redirect import Redirect
from agent.core.settings import Settings
from agent.kernel.exec import run
from agent.kernel.netns import Netns, unpin
from agent.reconciler.converge import verify
from agent.sources.state import backend_record
from agent.sources.state.notes import Note, Notes

pytestmark = pytest.mark.root
MARKS = {"istio.io/dataplane-mode": "ambient"}
RECORD = Recorded(
    backend="nftables", reason="it works", host="off", host_reason="", release=os.uname().release, time=0.0
)


@pytest.fixture
def netns() -> Iterator[Path]:
    with pod("slu-early") as made:
        yield made.path


@pytest.mark.parametrize(
    ("record", "backend", "captured", "mended"),
    [
        (RECORD, "auto", True, True),
        (RECORD, "nftables", True, True),
        (RECORD, "iptables", True, False),
        (RECORD, "auto", False, False),
        (replace(RECORD, release="another boot"), "auto", True, False),
        (None, "nftables", True, False),
    ],
)
def test_rules_are_back(
    netns: Path, tmp_path: Path, record: Recorded | None, backend: str, captured: bool, mended: bool
) -> None:
    settings = Settings(run_dir=str(tmp_path), backend=backend)
    state = Notes(settings.run_dir)
    if record:
        backend_record.save(settings.run_dir, record)
    pod = Pod("u1", "shop", "web", netns_path=str(netns), annotations=MARKS, source="cni")
    with Netns.open(netns) as inside:
        state.save(Note(pod, captured=captured, netns=inside.id))
    try:
        repair_noted(settings, state).namespaces.close()
        shown = run(["nft", "-s", "list", "ruleset"], netns=netns).stdout
        assert ("istio-ambient-nat" in shown) is mended
        assert "15008" not in shown, "no ztunnel listens there, so the loop would take the exemption back"
        assert bool(run(["ip", "rule", "show", "fwmark", "0x111/0xfff"], netns=netns).stdout) is mended
        (note,) = state.load()
        assert note.captured is captured and note.pod.uid == "u1"
    finally:
        unpin(state.pin("u1"))


def test_the_loop_has_nothing_to_repeat(netns: Path, tmp_path: Path) -> None:
    """It gets open namespaces and layers, and finds tables that have their owner: they are not replaced once more."""
    settings = Settings(run_dir=str(tmp_path), backend="nftables")
    backend_record.save(settings.run_dir, RECORD)
    state = Notes(settings.run_dir)
    one = Pod("u1", "shop", "web", netns_path=str(netns), annotations=MARKS, source="cni")
    with Netns.open(netns) as inside:
        state.save(Note(one, captured=True, netns=inside.id))
    repaired = repair_noted(settings, state)
    try:
        assert tuple(repaired.layers) == LAYERS["nftables"]
        target = repaired.namespaces.opened("u1")
        assert target is not None
        assert repaired.layers["nftables"].probe().ok
        want = Redirect(hbone=False)
        assert verify(target, want, tuple(repaired.layers.values())) == {}
        plan = repaired.layers["nftables"].plan(want, repaired.layers["nftables"].read(target))
        assert not plan.steps, plan
    finally:
        repaired.namespaces.close()
        unpin(state.pin("u1"))


def test_ebpf_programs_are_attached_again(tmp_path: Path) -> None:
    """The listeners are in the maps, so ztunnel is not needed. Where they are not, the first passes decide."""
    with stage(Redirect(), name="slu-early") as node, agent(node) as other:
        settings = Settings(run_dir=str(tmp_path), backend="ebpf", bpf_dir=str(node.node.pins.root))
        backend_record.save(settings.run_dir, replace(RECORD, backend="ebpf"))
        state = Notes(settings.run_dir)
        pod = Pod(
            "u1", "shop", "web", netns_path=str(node.pod.path), addresses=(POD[4],), annotations=MARKS, source="cni"
        )
        state.save(Note(pod, captured=True, netns=node.pod.target.netns.id))
        for link in (node.node.pins.node.link("connect4"), node.node.pins.pod(node.pod.cookie).link("lookup")):
            run(["bpftool", "link", "detach", "id", str(bpftool.shown("link", "show", "pinned", str(link))["id"])])
        try:
            with node.pod.make() as app:
                app.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    app.connect((PEER[4], APP))
            assert not waiting(node.app), "a connection of an enrolled pod has escaped"
            repair_noted(settings, state).namespaces.close()
            assert not other.wrong(Redirect(hbone=False, marks=False)), "as the loop wants a pod without 15008"
            with node.pod.make() as app:
                app.connect((PEER[4], APP))
                with accepted(node.ztunnel.outbound) as inner:
                    carries(app, inner)
            near, inner = from_client(node, "IPv4")
            with near, inner:
                carries(near, inner)
        finally:
            unpin(state.pin("u1"))


def test_a_change_to_ebpf_is_left_to_the_first_passes(tmp_path: Path) -> None:
    """Until ztunnel's listeners are known the old rules stay in force, and the agent's loop knows about these."""
    with stage(Redirect(), name="slu-early", ztunnel=False) as node, agent(node) as other:
        settings = Settings(run_dir=str(tmp_path), backend="ebpf", bpf_dir=str(node.node.pins.root))
        backend_record.save(settings.run_dir, replace(RECORD, backend="ebpf"))
        other.remove()
        state = Notes(settings.run_dir)
        pod = Pod(
            "u1", "shop", "web", netns_path=str(node.pod.path), addresses=(POD[4],), annotations=MARKS, source="cni"
        )
        state.save(Note(pod, captured=True, netns=node.pod.target.netns.id))
        try:
            repair_noted(settings, state).namespaces.close()
            assert not other.wrong(None), "nothing of the pod was made"
        finally:
            unpin(state.pin("u1"))


def test_a_pod_whose_annotation_is_refused_keeps_what_it_has(netns: Path, tmp_path: Path) -> None:
    """The loop applies nothing to it; a part of the annotation would be another rule set than the one it has."""
    settings = Settings(run_dir=str(tmp_path), backend="nftables")
    backend_record.save(settings.run_dir, RECORD)
    state = Notes(settings.run_dir)
    many = ",".join(f"tap{number}" for number in range(300))
    marks = {**MARKS, "istio.io/reroute-virtual-interfaces": many}
    with Netns.open(netns) as inside:
        state.save(
            Note(
                Pod("u1", "shop", "web", netns_path=str(netns), annotations=marks, source="cni"),
                captured=True,
                netns=inside.id,
            )
        )
    try:
        repair_noted(settings, state).namespaces.close()
        assert run(["nft", "-s", "list", "ruleset"], netns=netns).stdout == ""
    finally:
        unpin(state.pin("u1"))


def test_whatever_is_wrong_the_agent_starts(tmp_path: Path) -> None:
    settings = Settings(run_dir=str(tmp_path), backend="nftables")
    backend_record.save(settings.run_dir, RECORD)
    state = Notes(settings.run_dir)
    state.pods.mkdir()
    (state.pods / "bad.json").write_text("{")
    gone = Pod("u2", "shop", "gone", netns_path="/run/netns/slu-nowhere", annotations=MARKS)
    state.save(Note(gone, captured=True, netns=None))
    repair_noted(settings, state).namespaces.close()
    assert state.damaged == ["bad.json"]
