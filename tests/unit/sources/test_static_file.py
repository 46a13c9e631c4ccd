# SPDX-License-Identifier: Apache-2.0
"""The static file as it changes: what is listed is enrolled, what is no longer is set free, mistakes change nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent.core.model.pods import Pod, PodMark, PodTable
from agent.core.model.status import State, Status
from agent.core.policy.decide import decide
from agent.core.settings import Settings
from agent.sources.static_file import StaticFile

WEB = "- {namespace: shop, name: web, netns: /run/netns/web}\n"
DB = "- {namespace: shop, name: db, netns: /run/netns/db}\n"


class Reconciling:
    """Notes what it was told, and whether the pod was enrolled at that moment."""

    def __init__(self, table: PodTable) -> None:
        self.table, self.told = table, list[tuple[str, str, bool | None]]()
        self.leaving, self.fails = 0, False  # passes until nothing is left, and whether they fail

    def _note(self, verb: str, uid: str) -> None:
        pod = self.table.get(uid)
        self.told.append((verb, uid, None if pod is None else decide(pod, Settings()).enrolled))

    def wake(self, uid: str, cause: str = "") -> None:
        self._note("wake", uid)

    async def settled(self, uid: str) -> Status:
        self._note("settled", uid)
        return self.status(uid)

    def status(self, uid: str) -> Status:
        return Status(State.FAILED if self.fails else State.EXCLUDED, leaving=self.leaving > 0)

    async def progressed(self) -> None:
        self._note("left", "")
        self.leaving -= 1

    async def forget(self, uid: str) -> None:
        self._note("forget", uid)


class Bench:
    def __init__(self, folder: Path) -> None:
        self.file, self.table = folder / "pods.yaml", PodTable()
        self.reconciler = Reconciling(self.table)
        self.source = StaticFile(str(self.file), self.table, self.reconciler)

    def load(self, *entries: str) -> list[tuple[str, str, bool | None]]:
        """Writes the file and reads it; what the reconciler was told."""
        self.file.write_text("pods:\n" + "".join(entries) if entries else "pods: []\n")
        return self.read()

    def read(self) -> list[tuple[str, str, bool | None]]:
        self.reconciler.told.clear()
        asyncio.run(self.source.load())
        return list(self.reconciler.told)

    @property
    def uids(self) -> set[str]:
        return {pod.uid for pod in self.table}


def test_listed_pods_are_enrolled_and_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.load(WEB) == [("wake", "static.shop.web", True)]
    assert bench.read() == []
    assert bench.load(WEB, DB) == [("wake", "static.shop.db", True)]
    assert bench.uids == {"static.shop.web", "static.shop.db"}


def test_a_removed_pod_loses_its_rules_and_is_then_forgotten(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.load(WEB, DB)
    assert bench.load(DB) == [("settled", "static.shop.web", False), ("forget", "static.shop.web", None)]
    assert bench.uids == {"static.shop.db"}


def test_a_pod_that_becomes_a_mark_loses_its_rules_too(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.load(WEB)
    told = bench.load("- {namespace: shop, name: web}\n")
    assert ("settled", "static.shop.web", False) in told
    assert told[-1] == ("forget", "static.shop.web", None)


def test_a_file_with_a_mistake_changes_nothing_and_a_mended_one_is_taken(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.load(WEB)
    for broken in ("- {namespace: shop, nam: db}\n", "- [\n", "- {namespace: shop, name: 'D B', netns: /n}\n"):
        assert bench.load(WEB, broken) == []
        assert bench.uids == {"static.shop.web"}
        assert bench.source.error.startswith(f"{bench.file}:")
        assert bench.read() == []
        assert bench.source.error  # still shown
    bench.file.write_bytes(b"pods: \xff\xfe\n")
    assert bench.read() == [] and bench.source.error
    assert bench.load(DB, WEB) == [("wake", "static.shop.db", True)]
    assert bench.source.error == ""


def test_a_missing_file_lists_no_pods(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.read() == [] and bench.source.error == ""
    bench.load(WEB)
    bench.file.unlink()
    assert [told[0] for told in bench.read()] == ["settled", "forget"]
    assert bench.read() == []
    assert bench.load(WEB) == [("wake", "static.shop.web", True)]


def test_a_pod_is_not_forgotten_before_the_last_of_its_rules_is_gone(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.load(WEB)
    bench.reconciler.leaving = 2
    assert [told[0] for told in bench.load()] == ["settled", "left", "left", "forget"]


def test_a_pod_whose_rules_cannot_be_removed_does_not_hold_up_the_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.load(WEB)
    bench.reconciler.leaving, bench.reconciler.fails = 1, True
    assert bench.load(DB) == [("wake", "static.shop.db", True), ("settled", "static.shop.web", False)]
    assert bench.uids == {"static.shop.web", "static.shop.db"}


def test_pods_that_move_to_another_namespace_do_not_hold_up_the_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.load(WEB)
    told = bench.load(WEB.replace("netns/web", "netns/other"), DB)
    assert [(verb, uid.rpartition(".")[2]) for verb, uid, _ in told] == [
        ("wake", "db"),
        ("settled", "web"),
        ("forget", "web"),
        ("wake", "web"),
    ]
    assert {pod.netns_path for pod in bench.table} == {"/run/netns/other", "/run/netns/db"}


def test_a_directory_in_its_place_is_an_error_that_is_shown(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.load(WEB)
    bench.file.unlink()
    bench.file.mkdir()
    assert bench.read() == []
    assert "directory" in bench.source.error and bench.uids == {"static.shop.web"}


def test_pods_that_a_predecessor_took_from_the_file_are_set_free(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.table.seen(Pod("old", "shop", "old", labels={"istio.io/dataplane-mode": "ambient"}, source="static"))
    bench.table.seen(Pod("cni", "shop", "cni", source="cni"))
    assert bench.load(WEB)[1:] == [("settled", "old", False), ("forget", "old", None)]
    assert bench.uids == {"cni", "static.shop.web"}


def test_marks_enrol_pods_that_the_plugin_brings(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.table.seen(Pod("u1", "shop", "web", source="cni"))
    assert bench.load("- {namespace: shop, name: web}\n") == [("wake", "u1", True)]
    assert bench.load() == [("wake", "u1", False)]


def test_a_listed_pod_that_the_cni_plugin_brought_is_marked_and_not_there_twice(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.table.seen(Pod("u-1", "shop", "web", netns_path="/run/netns/cni-1", source="cni"))
    assert bench.load(WEB) == [("wake", "u-1", True)]
    assert (bench.uids, bench.read()) == ({"u-1"}, [])
    bench.table.gone("u-1")
    assert bench.read() == [("wake", "static.shop.web", True)] and bench.read() == []
    bench.table.seen(Pod("u-2", "shop", "web", netns_path="/run/netns/cni-2", source="cni"))
    assert bench.load() == [("wake", "u-2", False)] and bench.uids == {"u-2"}
    bench.table.gone("u-2")
    assert not bench.uids and bench.read() == []


def test_without_a_file_what_an_earlier_process_took_from_one_is_set_free(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    ambient = {"istio.io/dataplane-mode": "ambient"}
    listed = Pod("static.shop.web", "shop", "web", netns_path="/n", annotations=ambient, source="static")
    bench.table.restored(listed)
    bench.table.restored(Pod("u-1", "shop", "db").marked(PodMark(ambient)))
    bench.source = StaticFile("", bench.table, bench.reconciler)
    assert bench.read() == [("wake", "u-1", False), ("settled", listed.uid, False), ("forget", listed.uid, None)]
    assert bench.uids == {"u-1"}


def test_a_file_that_cannot_be_read_after_a_restart_keeps_what_was_marked(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.table.restored(Pod("u-1", "shop", "db").marked(PodMark({"istio.io/dataplane-mode": "ambient"})))
    bench.file.write_text("pods: [")
    assert bench.read() == []
    (pod,) = bench.table
    assert decide(pod, Settings()).enrolled
