# SPDX-License-Identifier: Apache-2.0
"""What libcni remembers of sandboxes: who runs, should be captured and was never announced."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.model.pods import Pod
from agent.sources.cni.cache import ANNOTATIONS, CachedSandbox, find, parse

UID = "11111111-2222-4333-8444-555555555555"
SANDBOX = "ab" * 32


def note(*, chained: bool = False, uid: str = UID, sandbox: str = SANDBOX, **changes: Any) -> bytes:
    """As containerd 1.6 of Debian 12 leaves it."""
    plugins = [{"type": "ptp"}, *([{"type": "sluice-cni"}] if chained else [])]
    config = json.dumps({"cniVersion": "1.0.0", "name": "lab", "plugins": plugins})
    value = {
        "kind": "cniCacheV1", "containerId": sandbox, "config": base64.b64encode(config.encode()).decode(),
        "ifName": "eth0", "networkName": "lab",
        "cniArgs": [["IgnoreUnknown", "1"], ["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", "web"],
                    ["K8S_POD_INFRA_CONTAINER_ID", sandbox], ["K8S_POD_UID", uid]],
        "capabilityArgs": {"dns": {}, ANNOTATIONS: {"istio.io/dataplane-mode": "ambient"}},
    }  # fmt: skip
    return json.dumps({**value, **changes}).encode()


POD = Pod(UID, "shop", "web", annotations={"istio.io/dataplane-mode": "ambient"})


def test_parse() -> None:
    assert parse(note()) == CachedSandbox(SANDBOX, POD, chained=False)
    assert parse(note(chained=True)) == CachedSandbox(SANDBOX, POD, chained=True)
    plain = parse(note(capabilityArgs=None))
    assert plain is not None and plain.pod.annotations == {}


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"null", b"{}", note()[:-2], note(config=5), note(cniArgs=None), note(cniArgs=[["K8S_POD_NAME"]]),
        note(cniArgs=[]), note(capabilityArgs={ANNOTATIONS: [1]}), b"[" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_note_is_nobody(data: bytes) -> None:
    assert parse(data) is None


@given(st.binary() | st.recursive(st.none() | st.text() | st.integers(), lambda inner: st.lists(inner)).map(
    lambda value: note(cniArgs=value, capabilityArgs=value)))  # fmt: skip
def test_parse_raises_nothing(data: bytes) -> None:
    parse(data)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory of notes, and a /proc with one process of the pod, in a network namespace of its own."""
    (tmp_path / "results").mkdir()
    for pid, cgroup in (("1", "/init.scope"), ("self", "/"), ("7", f"/kubepods/besteffort/pod{UID}/{SANDBOX}")):
        (tmp_path / "proc" / pid / "ns").mkdir(parents=True)
        (tmp_path / "proc" / pid / "ns/net").write_text("") if pid == "7" else None
        (tmp_path / "proc" / pid / "cgroup").write_text(f"0::{cgroup}\n")
    (tmp_path / "proc/1/ns/net").write_text("")
    (tmp_path / "proc/self/ns/net").hardlink_to(tmp_path / "proc/1/ns/net")
    return tmp_path


def found(here: Path, *, wanted: bool = True) -> list[tuple[str, bool]]:
    notes = find(here / "results", lambda pod: wanted and pod.namespace == "shop", str(here / "proc"))
    return [(one.pod.key, one.chained) for one in notes]


def test_only_who_runs(here: Path) -> None:
    place = here / "results"
    assert found(here) == []
    (place / f"lab-{SANDBOX}-eth0").write_bytes(note())
    (place / "lab-half-eth0").write_bytes(note()[:40])
    (place / "lab-old-eth0").write_bytes(note(uid=UID.replace("1", "9"), sandbox="cd" * 32))
    assert found(here) == [("shop/web", False)]
    (place / f"lab-{SANDBOX}-eth0").write_bytes(note(chained=True))
    assert found(here) == [("shop/web", True)]
    assert found(here, wanted=False) == []


def test_without_notes_of_anybody_nothing_else_is_read(here: Path) -> None:
    assert list(find(here / "nowhere", lambda pod: True, str(here / "no-proc"))) == []
