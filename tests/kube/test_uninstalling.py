# SPDX-License-Identifier: Apache-2.0
"""`sluice uncapture --annotations` against an API server: no pod of the node that is not captured says that it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support import apiserver_objects as objects
from support.apiserver import ApiServer

from agent.cli import uncapture
from agent.core.names import REDIRECTION


@pytest.fixture
def config(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Settings of an agent on node1, where istio-cni's agent does not run."""
    monkeypatch.setattr(uncapture, "istio_agent_runs", lambda *_: "")
    access = {"kube_server": server.url, "kube_token_file": server.token_file, "kube_ca_file": server.ca_file}
    path = tmp_path / "sluice.yaml"
    path.write_text(yaml.safe_dump({**access, "node_name": "node1", "host_root": str(tmp_path)}))
    return str(path)


def put(server: ApiServer, name: str, node: str = "node1", **annotations: str) -> None:
    server.put(objects.pod(name, uid=f"uid-{name}", node=node, annotations={"own": "1", **annotations}))


def annotated(server: ApiServer) -> set[str]:
    """The pods that have it; none has lost anything else."""
    found = {one["metadata"]["name"]: one["metadata"]["annotations"] for one in server.objects("pods")}
    assert all(one["own"] == "1" for one in found.values())
    return {name for name, one in found.items() if REDIRECTION in one}


def test_it_is_taken_from_the_nodes_pods_that_are_not_captured(server: ApiServer, config: str) -> None:
    for name in ("one", "two", "kept"):
        put(server, name, **{REDIRECTION: "enabled"})
    put(server, "pending", **{REDIRECTION: "pending"})
    put(server, "plain")
    put(server, "elsewhere", node="node2", **{REDIRECTION: "enabled"})
    problems: list[str] = []
    assert uncapture.take_back_annotations(config, ["uid-kept"], problems) == [f"{REDIRECTION} taken back from 3 pods"]
    assert annotated(server) == {"kept", "elsewhere"} and problems == []
    assert uncapture.take_back_annotations(config, ["uid-kept"], problems) == []  # it may be repeated


def test_more_pods_than_a_page_holds(server: ApiServer, config: str) -> None:
    for number in range(1001):
        put(server, f"p{number}", **({REDIRECTION: "enabled"} if number % 500 == 0 else {}))
    assert uncapture.take_back_annotations(config, [], []) == [f"{REDIRECTION} taken back from 3 pods"]
    assert annotated(server) == set()


def test_what_passes_is_tried_again_and_a_role_that_is_gone_stops_nobody(server: ApiServer, config: str) -> None:
    put(server, "one", **{REDIRECTION: "enabled"})
    for code, told in ((500, 0), (403, 1)):
        problems: list[str] = []
        server.fault("write", "status", code=code, times=1)
        remarks = uncapture.take_back_annotations(config, [], problems)
        assert (len(remarks), len(problems)) == (told, 1 - told) and str(code) in str(remarks + problems)
    server.down()
    assert uncapture.take_back_annotations(config, [], problems) == [] and len(problems) == 1
    server.up()
    assert uncapture.take_back_annotations(config, [], []) == [f"{REDIRECTION} taken back from 1 pods"]


def test_nothing_is_taken_while_somebody_else_may_capture(
    server: ApiServer, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(server, "one", **{REDIRECTION: "enabled"})
    assert "not known" in uncapture.take_back_annotations(config, [""], [])[0]
    monkeypatch.setattr(uncapture, "istio_agent_runs", lambda *_: "its socket answers")
    assert "its socket answers" in uncapture.take_back_annotations(config, [], [])[0]
    assert annotated(server) == {"one"}


def test_without_an_api_server_there_is_nothing_to_do() -> None:
    assert uncapture.take_back_annotations("", [], []) == []
