# SPDX-License-Identifier: Apache-2.0
"""Places and their names, event by event."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.sources.kube.cluster_workloads import NamedObject, Places, pod, service

one = st.builds(
    NamedObject, st.sampled_from("abcd"), st.lists(st.sampled_from("123"), unique=True).map(tuple), st.integers(0, 2)
)
deeds = st.lists(st.tuples(st.sampled_from(["changed", "removed", "listed"]), st.lists(one, min_size=1, max_size=4)))


@given(deeds)
def test_any_order_of_events_is_what_a_full_rebuild_would_be(
    given_deeds: list[tuple[str, list[NamedObject[int]]]],
) -> None:
    """A place names somebody when it is one object's alone; nothing of what has gone is left."""
    told: list[None] = []
    places, there = Places[int](lambda: told.append(None)), dict[str, NamedObject[int]]()
    for verb, objects in given_deeds:
        if verb == "listed":
            there = {named.uid: named for named in objects}
            places.listed(list(there.values()))
        elif verb == "changed":
            there[objects[0].uid] = objects[0]
            places.changed(objects[0])
        else:
            there.pop(objects[0].uid, None)
            places.removed(objects[0])
        holders = {place: [n for n in there.values() if place in n.endpoints] for place in "123"}
        assert places.names == {place: held[0].name for place, held in holders.items() if len(held) == 1}
        assert places._objects == there and set(places._holders) == {place for place, held in holders.items() if held}


def test_nothing_is_told_when_nothing_changed() -> None:
    """Most events of 20,000 pods are of their status."""
    told: list[None] = []
    places = Places[str](lambda: told.append(None))
    places.changed(NamedObject("a", ("1",), "x"))
    assert len(told) == 1
    places.changed(NamedObject("a", ("1",), "x"))
    places.listed([NamedObject("a", ("1",), "x")])
    assert len(told) == 1


def row(**cells: object) -> dict[str, object]:
    return {"metadata": {"uid": "u", "namespace": "shop", "name": "web-1", "labels": {"a": "b"}}, "cells": cells}


def test_rows_of_pods() -> None:
    """Not scheduled yet, and ended: known, and found nowhere."""
    assert pod(row(IP="10.0.0.1"), lambda *words: words) == ("u", ("10.0.0.1",), ("shop", "web-1", {"a": "b"}))
    for cells in ({}, {"IP": "<none>"}, {"IP": 5}, {"IP": None}):
        assert pod(row(**cells), lambda *words: words) == ("u", (), ("shop", "web-1", {"a": "b"}))
    ended = {**row(IP="10.0.0.1"), "conditions": [None, {"type": "Completed", "status": "True"}]}
    assert pod(ended, lambda *words: 0) == ("u", (), 0)
    for odd in (
        {},
        {"metadata": 1},
        {"metadata": {"uid": "u"}},
        {"metadata": {"uid": "/", "namespace": "a", "name": "b"}},
    ):
        assert pod(odd, lambda *words: 0) is None and service(odd, lambda *words: 0) is None


def test_rows_of_services() -> None:
    """Ports as printService writes them."""

    def places(address: object, ports: object) -> tuple[object, ...]:
        found = service(row(**{"Cluster-IP": address, "Port(s)": ports}), lambda *words: words)
        assert found is not None and found.name == ("shop", "web-1")
        return found.endpoints

    assert places("10.96.0.1", "80/TCP,443:30443/TCP,53/UDP,53/TCP") == tuple(("10.96.0.1", p) for p in (80, 443, 53))
    assert places("fd00::1", "<none>") == (("fd00::1", 0),)
    assert places("None", "80/TCP") == places("<none>", "80/TCP") == places("", None) == ()
    assert places("10.96.0.1", "http/TCP,999999/TCP") == (("10.96.0.1", 0),)
