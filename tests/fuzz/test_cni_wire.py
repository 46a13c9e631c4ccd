# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import ProtocolError
from agent.sources.cni.wire import MAX_REPLY, CniReply, CniVerb, frame, parse_request

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ADDRESS = st.sampled_from(["10.0.0.1/8", "::1/128", "fe80::1%x/64", "010.0.0.1", "1/1", ""]) | st.ip_addresses().map(
    str
)
ITEM = st.fixed_dictionaries({}, optional={"address": ADDRESS | ANY, "containerID": st.text() | ANY, "ifname": ANY})
CONFIG = st.fixed_dictionaries(
    {},
    optional={
        "prevResult": st.fixed_dictionaries({}, optional={"ips": st.lists(ITEM | ANY, max_size=3) | ANY}) | ANY,
        "runtimeConfig": st.fixed_dictionaries(
            {},
            optional={"io.kubernetes.cri.pod-annotations": st.dictionaries(st.text(), st.text() | ANY) | ANY},
        )
        | ANY,
        "cni.dev/valid-attachments": st.lists(ITEM | ANY, max_size=3) | ANY,
    },
)
PAIR = st.tuples(
    st.sampled_from(["K8S_POD_NAMESPACE", "K8S_POD_NAME", "K8S_POD_UID", "Ignore", ""]),
    st.sampled_from(["=", "==", ""]),
    st.from_regex(r"[a-z0-9.-]{0,4}", fullmatch=True) | st.text(max_size=5),
).map("".join)
REQUEST = st.fixed_dictionaries(
    {
        "verb": st.sampled_from([*CniVerb]).map(str) | ANY,
        "container_id": st.from_regex(r"[a-z0-9._-]{0,4}", fullmatch=True) | ANY,
        "ifname": st.from_regex(r"[a-z0-9.:/ -]{0,16}", fullmatch=True) | ANY,
        "netns": st.sampled_from(["", "/run/netns/x", "x"]) | ANY,
        "args": st.lists(PAIR, max_size=4).map(";".join) | ANY,
        "config": CONFIG | ANY,
    }
)
NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)?")


def _check(payload: bytes) -> None:
    """A request that parses has only ids and names that are safe as file names, and nothing in it raises."""
    try:
        request = parse_request(payload)
    except ProtocolError as error:
        assert str(error).encode()  # it can be sent back
        return
    for name in (request.container_id, request.pod_namespace, request.pod_name, request.pod_uid):
        assert NAME.fullmatch(name)
    for container_id, _ in request.valid_attachments:
        assert NAME.fullmatch(container_id)
    assert "/" not in request.ifname
    assert bool(request.container_id) or request.verb in (CniVerb.STATUS, CniVerb.GC)
    json.dumps([request.annotations, request.addresses], ensure_ascii=False).encode()
    request.netns.encode()


@given(REQUEST)
def test_requests_like_the_real_ones(request: dict[str, Any]) -> None:
    """A request that parses is safe to use; one that does not raises ProtocolError and nothing else."""
    _check(json.dumps(request).encode())


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="ignore")))
def test_bytes(payload: bytes) -> None:
    """Bytes either parse or raise ProtocolError and nothing else."""
    with contextlib.suppress(ProtocolError):
        parse_request(payload)


@given(st.integers(0, 2**31 - 1), st.text(), st.text(), st.integers(1, 70_000))
def test_replies(code: int, msg: str, details: str, times: int) -> None:
    """A reply is always one frame of a size that the plugin takes, and a JSON object with its code."""
    framed = CniReply(code, msg, details * times).encode()
    assert framed == frame(framed[4:])
    assert len(framed) - 4 <= MAX_REPLY
    assert json.loads(framed[4:])["code"] == code
