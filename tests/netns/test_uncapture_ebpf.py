# SPDX-License-Identifier: Apache-2.0
"""What backend ebpf leaves in the kernel, taken away or handed over by commands that need no agent; and preflight."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import bpftool
from support.ebpf import EbpfNode
from support.node import until
from support.rules import Pod, layers
from support.rules import pod as made

from agent.__main__ import main
from agent.backends.ebpf import object_files
from agent.cli.uncapture import leftovers
from agent.core.model.pods import Pod as Facts
from agent.core.model.redirect import Redirect
from agent.kernel.bpf import load, syscall
from agent.kernel.bpf.map import Map
from agent.kernel.netns import unpin
from agent.reconciler.converge import settle, verify
from agent.sources.state.notes import Note, Notes

pytestmark = pytest.mark.root
WANT = Redirect()
MAPS = ("pods", "policies", "listeners", "beside")


@pytest.fixture
def node() -> Iterator[EbpfNode]:
    one = EbpfNode(ztunnel=False)
    try:
        yield one
    finally:
        one.close()


@pytest.fixture
def pod() -> Iterator[Pod]:
    with made("slu-ue-pod") as one:
        yield one


@pytest.fixture(autouse=True)
def no_pin_stays(tmp_path: Path) -> Iterator[None]:
    yield
    for pin in tmp_path.glob("netns/*"):
        unpin(pin)


def capture(node: EbpfNode, pod: Pod, run_dir: Path | None = None, uid: str = "uid-1") -> None:
    """As an agent did it that is gone, with its note and its pin if there is a run directory."""
    settle(pod.target, WANT, node.layers)
    if run_dir is not None:
        state, said = Notes(str(run_dir)), {"istio.io/dataplane-mode": "ambient"}
        state.save(
            Note(
                Facts(uid, "shop", "web", netns_path=str(pod.path), annotations=said),
                captured=True,
                netns=pod.target.netns.id,
            )
        )
        pod.target.netns.pin(state.pin(uid))
    pod.reopen()


def entries(node: EbpfNode) -> dict[str, int]:
    found = {}
    for name in MAPS:
        with Map.open(node.pins.maps / name) as one:
            found[name] = len(one.items())
    return found


def attached(node: EbpfNode, pod: Pod) -> set[int]:
    """Ids of all programs that are pinned, the node's and the pod's."""
    places = (node.pins.node.path, node.pins.pod(pod.target.netns.id.cookie).path)
    found = set()
    for pin in (pin for place in places for pin in (place / "programs").iterdir()):
        fd = syscall.get(pin)
        found.add(syscall.program_info(fd).id)
        os.close(fd)
    return found


def programs() -> set[int]:
    """Ids of all programs of the machine."""
    return {one["id"] for one in bpftool.shown("prog", "list")}


def held() -> list[str]:
    """What of BPF this process holds by descriptor. With nothing pinned, nothing else keeps a program or a link."""
    found = []
    for one in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.append(str(one.readlink()))
    return sorted(word for word in found if "bpf" in word)


def uncapture(node: EbpfNode, pod: Pod, run_dir: Path, capsys: pytest.CaptureFixture[str], *more: str) -> list[dict]:  # type: ignore[type-arg]
    words = ["uncapture", "--all", "-o", "json", "--run-dir", str(run_dir), "--bpf-dir", str(node.pins.root)]
    capsys.readouterr()
    assert main([*words, "--netns", str(pod.path), *more]) == 0
    found: list[dict] = json.loads(capsys.readouterr().out)["namespaces"]  # type: ignore[type-arg]
    return found


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "no-state"])
def test_uncapture_needs_no_agent_and_leaves_nothing_of_the_pod(
    node: EbpfNode, pod: Pod, noted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = pod.dump()
    with made("slu-ue-other") as other:
        capture(node, other)
        stays = entries(node)
        capture(node, pod, tmp_path if noted else None)
        assert entries(node)["pods"] == 2
        (row,) = uncapture(node, pod, tmp_path, capsys, "--dry-run")
        assert (row["result"], row["layers"]) == ("would be removed", ["ebpf", "routing"])
        assert "map pods: drop" in str(row["scripts"]) and entries(node)["pods"] == 2
        (row,) = uncapture(node, pod, tmp_path, capsys)
        assert (row["result"], row["found"], row["errors"]) == ("removed", "sluice", [])
        assert pod.dump() == before
        assert entries(node) == stays, "the other pod's are still there"
        assert node.pins.pods() == (other.target.netns.id.cookie,)
        assert verify(other.target, WANT, node.layers) == {}
        assert uncapture(node, pod, tmp_path, capsys) == []
    assert not list(tmp_path.glob("pods/*")) and not list(tmp_path.glob("netns/*"))


def test_at_last_nothing_of_the_node_is_left_whatever_made_it(node: EbpfNode, pod: Pod) -> None:
    """Pods that ended, another version's directory, what a killed agent had begun to try."""
    with made("slu-ue-gone") as gone:
        capture(node, gone)
        ids = attached(node, gone)
    capture(node, pod)
    ids |= attached(node, pod)
    for name in ("v0", "try-4711"):
        (node.pins.root / name).mkdir()
        named = {"lookup": node.pins.root / name / "lookup"}
        load.load(object_files.path("lookup"), node.pins.root / name / "maps", named, {}, bytes(8))
    (row,) = leftovers(node.pins, dry_run=True)
    assert row.removal.result == "would be removed" and node.pins.root.exists()
    assert ids <= programs()
    (row,) = leftovers(node.pins, dry_run=False)
    assert (row.netns, row.removal.result, row.right) == ("node", "removed", True)
    assert not node.pins.root.exists()
    until(lambda: not ids & programs(), "the kernel let go of every program")
    assert leftovers(node.pins, dry_run=False) == []


def rules(pod: Pod) -> str:
    shown = pod.sh("nft list ruleset; ip rule; ip -6 rule; ip route show table 100; ip -6 route show table 100")
    return "\n".join(sorted(re.sub(r"packets \d+ bytes \d+", "packets N bytes N", shown).split("\n}\n")))


def test_a_pod_is_handed_back_as_one_of_nftables_would_be(
    node: EbpfNode, pod: Pod, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--run-dir", str(tmp_path), "--bpf-dir", str(node.pins.root)]
    capture(node, pod, tmp_path)
    words = ["handback", "--all", *where, "--netns", str(pod.path)]
    assert main([*words, "--dry-run"]) == 0
    assert "map pods: drop" in capsys.readouterr().out and entries(node)["pods"] == 1
    assert main(words) == 0
    assert "connections that came in before are cut" in capsys.readouterr().out
    assert entries(node) == dict.fromkeys(MAPS, 0) and node.pins.pods() == ()
    with made("slu-ue-nft") as other:
        settle(other.target, WANT, layers("nftables"))
        said = {"istio.io/dataplane-mode": "ambient"}
        Notes(str(tmp_path)).save(
            Note(Facts("uid-2", "shop", "db", annotations=said), captured=True, netns=other.target.netns.id)
        )
        other.reopen()
        assert main(["handback", "--all", *where, "--netns", str(other.path)]) == 0
        assert rules(pod) == rules(other)


def test_preflight_tries_every_feature_and_packets_and_leaves_nothing(
    node: EbpfNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = held()
    where = ["--run-dir", str(tmp_path), "--bpf-dir", str(node.pins.root)]
    for backend in ("ebpf", "auto"):
        assert main(["preflight", "--backend", backend, "-o", "json", *where]) == 0
        value = json.loads(capsys.readouterr().out)
        features = {one["name"]: one for one in value["features"] if one["needed_by"] == ["ebpf"]}
        assert {"eBPF objects", "libbpf", "cgroup v2 hierarchy", "sk_lookup", "tcx"} < features.keys()
        assert all(one["present"] for one in features.values()), features
        assert value["backend"] == ("ebpf" if backend == "ebpf" else "nftables")
        assert value["selftest"][value["backend"]] == []
    assert not node.pins.root.exists() or not list(node.pins.root.iterdir())
    assert held() == before


def test_preflight_names_what_is_missing_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a file is no bpf file system can be."""
    (tmp_path / "file").write_text("")
    words = ["preflight", "--backend", "ebpf", "--run-dir", str(tmp_path)]
    assert main([*words, "--bpf-dir", str(tmp_path / "file" / "sluice"), "-o", "json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["backend"] == "nftables" and "ebpf cannot be used" in value["reason"]
    features = {one["name"]: one for one in value["features"]}
    assert not features["bpffs"]["present"] and "CONFIG_BPF_SYSCALL" in features["bpffs"]["remedy"]
    assert "mount bpffs" in features["bpffs"]["words"]
