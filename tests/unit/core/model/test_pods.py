# SPDX-License-Identifier: Apache-2.0
"""The pod table: what sources say, merged, and who has to be looked at again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.errors import SettingsError
from agent.core.model.pods import KubePod, Pod, PodMark, PodTable, check_uid, mode

MODE = "istio.io/dataplane-mode"
WEB = Pod("u1", "shop", "web", container_id="c1", source="cni")
DB = Pod("u2", "shop", "db", container_id="c2", source="cni")


@pytest.fixture
def table() -> PodTable:
    made = PodTable()
    made.seen(WEB)
    made.seen(DB)
    return made


def test_only_what_is_new_is_looked_at(table: PodTable) -> None:
    assert table.seen(WEB) == set()
    newer = replace(WEB, addresses=("10.0.0.1",))
    assert table.seen(newer) == {"u1"}
    assert table.get("u1") == newer
    assert (len(table), list(table)) == (2, [newer, DB])


def test_gone(table: PodTable) -> None:
    assert table.gone("u1") == WEB
    assert table.gone("u1") is None
    assert (table.get("u1"), list(table)) == (None, [DB])


def test_an_older_container_does_not_take_the_newer_with_it(table: PodTable) -> None:
    newer = replace(WEB, container_id="c9")
    table.seen(newer)
    assert table.gone("u1", container_id="c1") is None
    assert table.by_container("c1") is None
    assert table.by_container("c9") == newer
    assert table.gone("u1", container_id="c9") == newer


def test_marks_add_to_the_annotations_of_pods_that_others_bring(table: PodTable) -> None:
    table.seen(replace(WEB, annotations={"own": "1", MODE: "none"}))
    ambient = PodMark({MODE: "ambient"})
    assert table.mark({"shop/web": ambient, "shop/later": ambient}) == {"u1"}
    assert [pod.annotations for pod in table] == [{"own": "1", MODE: "ambient"}, {}]
    assert table.mark({"shop/web": ambient, "shop/later": ambient}) == set()
    table.seen(Pod("u3", "shop", "later"))  # marked before it came
    later = table.get("u3")
    assert later is not None and later.annotations == {MODE: "ambient"}
    assert table.mark({"shop/later": PodMark({MODE: "none"})}) == {"u1", "u3"}
    web = table.get("u1")
    assert web is not None and web.annotations == {"own": "1", MODE: "none"}


def test_a_pod_is_found_by_uid_by_full_name_and_by_name(table: PodTable) -> None:
    other = Pod("u3", "bank", "web")
    table.seen(other)
    assert table.find("u1") == table.find("shop/web") == [WEB]
    assert table.find("db") == [DB]
    assert table.find("web") == [WEB, other]
    assert table.find("we") == table.find("") == []


def test_pods_may_come_and_go_while_they_are_listed(table: PodTable) -> None:
    for pod in table:
        table.gone(pod.uid)
        table.seen(Pod("x" + pod.uid, "a", "b"))
    assert len(table) == 2


def test_the_label_comes_before_the_annotation() -> None:
    assert mode(Pod("u", "a", "b", labels={MODE: "ambient"}, annotations={MODE: "none"})) == "ambient"
    assert mode(Pod("u", "a", "b", annotations={MODE: "none"})) == "none"
    assert mode(Pod("u", "a", "b")) == ""


@pytest.mark.parametrize("uid", ["", ".", "..", "a/b", "../a", "-a", "a b", "a\n", "a\0", "x" * 129, "é"])
def test_a_uid_that_is_no_file_name_is_refused(uid: str) -> None:
    with pytest.raises(SettingsError):
        check_uid(uid)


@pytest.mark.parametrize("uid", ["a", "0f5e-11", "static.shop.web", "x" * 128])
def test_uids(uid: str) -> None:
    assert check_uid(uid) == uid


MARK = PodMark({MODE: "ambient"}, {"app": "shop"}, "robot")


def test_a_mark_gives_labels_and_a_service_account_but_kubernetes_knows_the_account(table: PodTable) -> None:
    table.mark({"shop/web": MARK})
    (web,) = table.find("shop/web")
    assert (web.annotations, web.labels, web.service_account) == ({MODE: "ambient"}, {"app": "shop"}, "robot")
    table.know(KubePod("u1", "shop", "web", labels={"app": "x", "y": "z"}, service_account="web"))
    (web,) = table.find("shop/web")
    assert (web.labels, web.service_account) == ({"app": "shop", "y": "z"}, "web")
    table.unknow("u1", keep=True)
    table.mark({})
    (web,) = table.find("shop/web")
    assert (web.annotations, web.labels, web.service_account) == ({}, {"app": "x", "y": "z"}, "web")


@pytest.mark.parametrize("first", ["static", "cni"])
def test_a_pod_of_the_static_file_that_another_source_brings_is_one_pod(first: str) -> None:
    listed = Pod("static.shop.web", "shop", "web", netns_path="/n", annotations={MODE: "ambient"}, source="static")
    announced, table = Pod("u1", "shop", "web", netns_path="/run/netns/cni", source="cni"), PodTable()
    table.mark({"shop/web": MARK})
    for pod in (listed, announced) if first == "static" else (announced, listed):
        changed = table.seen(pod)
    assert changed == ({"u1", "static.shop.web"} if first == "static" else set())
    (pod,) = table.find("shop/web")
    assert (pod.uid, pod.annotations, len(table)) == ("u1", {MODE: "ambient"}, 1)
    table.gone("u1")
    assert table.find("shop/web") == [listed]
    table.lost("static.shop.web")
    assert not len(table)


def test_a_noted_pod_keeps_its_mark_until_the_file_is_read() -> None:
    table = PodTable()
    table.mark({"shop/web": MARK})
    table.seen(Pod("u1", "shop", "web", annotations={"own": "1"}, source="cni"))
    (noted,) = table
    again = PodTable()
    again.restored(noted)
    assert list(again) == [noted]
    assert again.mark({"shop/web": MARK}) == set()
    assert again.mark({}) == {"u1"}
    assert list(again) == [Pod("u1", "shop", "web", annotations={"own": "1"}, source="cni")]
