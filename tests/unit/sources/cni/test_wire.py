# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re

import pytest

from agent.core.errors import ProtocolError
from agent.sources.cni import wire
from agent.sources.cni.wire import MAX_REPLY, MAX_REQUEST, CniReply, CniRequest, CniVerb, frame, parse_request

ANNOTATIONS = "io.kubernetes.cri.pod-annotations"
ATTACHMENTS = "cni.dev/valid-attachments"


def request(**changes: object) -> dict[str, object]:
    good: dict[str, object] = {
        "verb": "ADD",
        "container_id": "c0ffee",
        "ifname": "eth0",
        "netns": "/run/netns/pod",
        "args": "K8S_POD_UID=u-1;IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0",
        "config": {"cniVersion": "1.1.0", "name": "lab"},
    }
    return {**good, **changes}


def parse(**changes: object) -> CniRequest:
    return parse_request(json.dumps(request(**changes)).encode())


def test_add() -> None:
    config = {
        "runtimeConfig": {ANNOTATIONS: {"istio.io/dataplane-mode": "ambient"}},
        "prevResult": {"ips": [{"address": "10.0.0.5/24"}, {"address": "FD00:0::5/64"}, {"address": "10.0.0.5/8"}]},
    }
    got = parse(config=config)
    assert got == CniRequest(
        CniVerb.ADD,
        "c0ffee",
        ifname="eth0",
        netns="/run/netns/pod",
        args={"K8S_POD_UID": "u-1", "IgnoreUnknown": "1", "K8S_POD_NAMESPACE": "shop", "K8S_POD_NAME": "web-0"},
        config=config,
    )
    assert (got.pod_namespace, got.pod_name, got.pod_uid) == ("shop", "web-0", "u-1")
    assert got.annotations == {"istio.io/dataplane-mode": "ambient"}
    assert got.addresses == ("10.0.0.5", "fd00::5")
    assert got.valid_attachments == ()


def test_what_is_absent_is_empty() -> None:
    got = parse(args="")
    assert (got.pod_namespace, got.pod_name, got.pod_uid, got.annotations, got.addresses) == ("", "", "", {}, ())


@pytest.mark.parametrize(
    "config",
    [
        {"prevResult": None, "runtimeConfig": None},
        {"prevResult": {"ips": None}, "runtimeConfig": {ANNOTATIONS: None}},
        {"prevResult": {}, "runtimeConfig": {}},
    ],
)
def test_null_is_absent_as_go_writes_it(config: dict[str, object]) -> None:
    assert (parse(config=config).addresses, parse(config=config).annotations) == ((), {})


def test_second_del() -> None:
    got = parse(verb="DEL", netns="")
    assert (got.verb, got.container_id, got.netns) == (CniVerb.DEL, "c0ffee", "")


@pytest.mark.parametrize(
    "changes",
    [
        {"ifname": "a/b"},
        {"netns": "relative"},
        {"args": "nonsense"},
        {"args": "K8S_POD_NAMESPACE=../x"},
        {"config": {"prevResult": []}},
        {"config": {"runtimeConfig": {ANNOTATIONS: {"a": 1}}}},
    ],
)
def test_del_with_something_bad_keeps_the_container_id(changes: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        parse(**changes)
    assert parse(verb="DEL", **changes) == CniRequest(CniVerb.DEL, "c0ffee", ifname="", netns="", args={}, config={})


def test_gc() -> None:
    config = {ATTACHMENTS: [{"containerID": "a.1", "ifname": "eth0"}, {"containerID": "b", "ifname": "net1"}]}
    got = parse(verb="GC", container_id="", ifname="", netns="", args="", config=config)
    assert got.valid_attachments == (("a.1", "eth0"), ("b", "net1"))
    assert parse(verb="GC", config={ATTACHMENTS: []}).valid_attachments == ()


def test_status_needs_no_container() -> None:
    assert parse(verb="STATUS", container_id="", ifname="", netns="", args="").container_id == ""


def test_gc_without_its_list_is_not_taken_for_an_empty_one() -> None:
    with pytest.raises(ProtocolError, match=re.escape(f"config.{ATTACHMENTS}: missing")):
        parse(verb="GC")


def test_of_an_argument_given_twice_the_last_counts() -> None:
    assert parse(args="K8S_POD_NAMESPACE=a;;K8S_POD_NAMESPACE=b;X=1=2;").args == {"K8S_POD_NAMESPACE": "b", "X": "1=2"}


def test_a_podman_container_name_is_a_pod_name() -> None:
    assert parse(args="K8S_POD_NAME=My_Box.1").pod_name == "My_Box.1"


def ips(*items: object) -> dict[str, object]:
    return {"prevResult": {"ips": list(items)}}


BAD: list[tuple[str, dict[str, object]]] = [
    ("verb", {"verb": "VERSION"}),
    ("verb", {"verb": "add"}),
    ("verb", {"verb": None}),
    ("verb", {"verb": ["ADD"]}),
    ("container_id", {"container_id": ""}),
    ("container_id", {"container_id": "../x"}),
    ("container_id", {"container_id": "-x"}),
    ("container_id", {"container_id": "x\n"}),
    ("container_id", {"container_id": "x" * 257}),
    ("container_id", {"container_id": 5}),
    ("container_id", {"container_id": "", "verb": "DEL"}),
    ("ifname", {"ifname": ""}),
    ("ifname", {"ifname": "."}),
    ("ifname", {"ifname": ".."}),
    ("ifname", {"ifname": "a/b"}),
    ("ifname", {"ifname": "a b"}),
    ("ifname", {"ifname": "a:b"}),
    ("ifname", {"ifname": "e" * 16}),
    ("netns", {"netns": ""}),
    ("netns", {"netns": "run/x"}),
    ("netns", {"netns": "/a\0b"}),
    ("netns", {"netns": "/\ud800"}),
    ("args", {"args": None}),
    ("args", {"args": "K8S_POD_NAME"}),
    ("args.K8S_POD_NAMESPACE", {"args": "K8S_POD_NAMESPACE=../etc"}),
    ("args.K8S_POD_NAMESPACE", {"args": "K8S_POD_NAMESPACE=" + "s" * 64}),
    ("args.K8S_POD_NAME", {"args": "K8S_POD_NAME=a/b"}),
    ("args.K8S_POD_UID", {"args": "K8S_POD_UID=.."}),
    ("args.K8S_POD_UID", {"args": "K8S_POD_UID=" + "u" * 129}),
    ("config", {"config": None}),
    ("config", {"config": []}),
    ("config.prevResult", {"config": {"prevResult": []}}),
    ("config.prevResult.ips", {"config": {"prevResult": {"ips": {}}}}),
    ("config.prevResult.ips[1].address", {"config": ips({"address": "10.0.0.1/8"}, {})}),
    ("config.prevResult.ips[0].address", {"config": ips("10.0.0.1")}),
    ("config.prevResult.ips[0].address", {"config": ips({"address": 5})}),
    ("config.prevResult.ips[0].address", {"config": ips({"address": "10.0.0.1/33"})}),
    ("config.prevResult.ips[0].address", {"config": ips({"address": "fe80::1%eth0/64"})}),
    ("config.runtimeConfig", {"config": {"runtimeConfig": []}}),
    (f"config.runtimeConfig.{ANNOTATIONS}", {"config": {"runtimeConfig": {ANNOTATIONS: []}}}),
    (f"config.runtimeConfig.{ANNOTATIONS}.k", {"config": {"runtimeConfig": {ANNOTATIONS: {"k": 1}}}}),
    (f"config.runtimeConfig.{ANNOTATIONS}.k", {"config": {"runtimeConfig": {ANNOTATIONS: {"k": "\ud800"}}}}),
    (f"config.{ATTACHMENTS}", {"verb": "GC", "config": {ATTACHMENTS: {}}}),
    (f"config.{ATTACHMENTS}[0]", {"verb": "GC", "config": {ATTACHMENTS: ["x"]}}),
    (f"config.{ATTACHMENTS}[0].containerID", {"verb": "GC", "config": {ATTACHMENTS: [{"ifname": "eth0"}]}}),
    (f"config.{ATTACHMENTS}[0].ifname", {"verb": "GC", "config": {ATTACHMENTS: [{"containerID": "a"}]}}),
]


@pytest.mark.parametrize(("key", "changes"), BAD)
def test_a_bad_value_is_refused_by_name(key: str, changes: dict[str, object]) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse(**changes)
    assert str(caught.value).startswith(f"{key}: ")


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"5", b'{"a":NaN}', b'"\xff"', b"[" * 200_000, b"9" * 9999])
def test_what_is_not_a_json_object_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"^request: not"):
        parse_request(payload)


def test_frame() -> None:
    assert frame(b"abc") == b"\0\0\0\x03abc"
    assert len(frame(b" " * MAX_REQUEST)) == MAX_REQUEST + 4
    with pytest.raises(ProtocolError):
        frame(b" " * (MAX_REQUEST + 1))


def decode(framed: bytes) -> dict[str, object]:
    assert int.from_bytes(framed[:4]) == len(framed) - 4
    decoded: dict[str, object] = json.loads(framed[4:])
    return decoded


def test_replies() -> None:
    assert decode(CniReply().encode()) == {"code": 0}
    assert decode(CniReply(11, "später").encode()) == {"code": 11, "msg": "später"}
    reply = CniReply(wire.DRIFT, "drift", "a\nb")
    assert decode(reply.encode()) == {"code": 100, "msg": "drift", "details": "a\nb"}


@pytest.mark.parametrize("text", ["x", "ü", "\0", "\U0001f419", "\udcff"])
def test_long_texts_are_cut_to_what_the_plugin_reads(text: str) -> None:
    framed = CniReply(100, text * 100_000, text * 100_000).encode()
    assert len(framed) <= MAX_REPLY + 4
    decoded = decode(framed)
    assert decoded["code"] == 100
    assert len(str(decoded["msg"])) == 4096
    assert len(str(decoded["details"])) > 2000
