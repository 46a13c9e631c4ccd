# SPDX-License-Identifier: Apache-2.0
"""Whatever an API server sends, it is understood, left out or refused by an error of ours; nothing else happens."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import KubeError, ProtocolError
from agent.core.model.pods import UID, KubePod
from agent.sources.kube import cluster_workloads, node_taints, objects, protocol
from agent.sources.kube.protocol import Lines, Listing, Rows

KEYS = [
    "metadata", "uid", "name", "namespace", "labels", "annotations", "kubernetes.io/config.mirror", "spec", "status",
    "phase", "podIP", "podIPs", "ip", "containerStatuses", "state", "running", "containerID", "cells", "IP",
    "rows", "items", "object", "type", "kind", "resourceVersion", "continue", "columnDefinitions", "Cluster-IP",
    "taints", "key", "effect", "hostNetwork", "deletionTimestamp", "code", "reason", "message", "conditions", "Port(s)",
]  # fmt: skip
scalars = st.one_of(
    st.sampled_from(["shop", "web-1", "u-1", "10.0.0.1", "fd00::1%x", "Succeeded", "Table", "80/TCP", "\ud800", ""]),
    st.text(max_size=6), st.integers(), st.floats(), st.none(), st.booleans(),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=25,
)
metadata = st.fixed_dictionaries(
    {"uid": st.just("u-1"), "name": st.just("web-1"), "namespace": st.just("shop")},
    optional={"labels": values, "annotations": values, "deletionTimestamp": values},
)
pods = st.fixed_dictionaries(
    {"metadata": metadata},
    optional={
        "spec": values,
        "status": values
        | st.fixed_dictionaries({}, optional={"podIPs": values, "containerStatuses": st.lists(values)}),
    },
)


@given(values | pods)
def test_any_object_is_a_sane_value_or_none(value: Any) -> None:
    """What is kept can be written anywhere: as UTF-8, as part of a file's name, as an address."""
    found = objects.pod(value)
    if found is not None:
        sane(found)
    space = objects.namespace(value)
    assert space is None or json.dumps(dict(space.labels), ensure_ascii=False).encode()


def sane(found: KubePod) -> None:
    assert UID.fullmatch(found.uid) and UID.fullmatch(found.api_uid) and "/" not in found.name + found.namespace
    texts = [*found.labels, *found.labels.values(), *found.annotations, *found.annotations.values()]
    texts += [found.service_account, found.runtime_class, *found.containers]
    assert all(isinstance(text, str) and text.encode() is not None for text in texts)
    assert all(objects.address(one) == one for one in found.addresses)
    assert {type(found.ended), type(found.deleting), type(found.running), type(found.host_network)} == {bool}


@given(pods)
def test_a_pod_that_can_be_told_apart_is_never_dropped(value: Any) -> None:
    """Odd parts of it cost those parts alone."""
    found = objects.pod(value)
    assert found is not None and found.api_uid == "u-1"


@given(values)
def test_any_row_and_node(value: Any) -> None:
    """Rows of Tables, whatever their cells; taints of a node; versions."""
    if not isinstance(value, dict):
        return
    for row in [value, *Rows().unfold(value), *Rows().unfold({**value, "kind": "Table", "rows": [value]})]:
        cluster_workloads.pod(row, lambda *words: words)
        cluster_workloads.service(row, lambda *words: words)
    node_taints.removal(value, node_taints.Taint("a"))
    assert isinstance(protocol.version(value), str)


@given(st.binary(max_size=80) | values.map(lambda value: json.dumps(value).encode()), st.integers(1, 9))
def test_any_answer_to_a_list(data: bytes, size: int) -> None:
    """Refused, or a list with a version; never objects that are none."""
    listing = Listing()
    try:
        for at in range(0, len(data), size):
            assert all(isinstance(one, dict) for one in listing.feed(data[at : at + size]))
        version, more = listing.end()
    except ProtocolError:
        return
    assert version and isinstance(more, str)


@given(st.lists(values, max_size=4), st.integers(1, 50), st.integers(0, 9))
def test_a_list_that_is_cut_anywhere_is_not_whole(items: list[Any], size: int, cut: int) -> None:
    """Whole, in any pieces, it has all its objects; one byte less, and it is refused."""
    data = json.dumps({"metadata": {"resourceVersion": "5"}, "items": items}).encode()
    listing, found = Listing(), list[Any]()
    for at in range(0, len(data), size):
        found += listing.feed(data[at : at + size])
    assert listing.end() == ("5", "")
    assert json.dumps(found) == json.dumps([one for one in items if isinstance(one, dict)])
    half = Listing()
    try:
        half.feed(data[: len(data) - 1 - cut])
        half.end()
    except ProtocolError:
        return
    raise AssertionError("half a list was taken for a whole one")


@given(st.binary(max_size=60) | values.map(lambda value: json.dumps({"type": "ADDED", "object": value}).encode()))
def test_any_line_of_a_watch(data: bytes) -> None:
    """An event, an ERROR, or none."""
    for line in Lines().feed(data + b"\n"):
        try:
            _, body = protocol.event(line)
        except (ProtocolError, KubeError):
            continue
        assert isinstance(body, dict)


@given(st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()), st.text(max_size=5))
def test_any_refusal_is_one_line(body: bytes, after: str) -> None:
    """In whatever form it comes."""
    error = protocol.refusal("GET /x", 429, body, {"retry-after": after})
    assert "\n" not in str(error) and isinstance(error.reason, str)
