# SPDX-License-Identifier: Apache-2.0
"""Row 0: istiod reaches a pod as its annotation says, so a pod that stays captured shows `enabled` and nothing else."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import apiserver_objects as objects
from support.apiserver import ApiServer
from support.apiserver_inside import served
from support.field import enabled
from support.node import Node, NodePod, node, until

from agent.core import names
from agent.core.names import DATAPLANE_MODE
from agent.kernel.netns import unpin
from agent.lab.node_services import LabBackend
from agent.migration.istio_agent import RUN_DIR

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with node("sluann") as made:
        yield made


@pytest.fixture(scope="module")
def api(here: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with served(here.netns, tmp_path_factory.mktemp("api")) as made:
        made.put(objects.namespace("shop", **{DATAPLANE_MODE: "ambient"}))
        yield made


def start(here: Node, api: ApiServer, backend: LabBackend = LabBackend.NFTABLES, **changes: Any) -> None:
    access = {"kube_server": api.url, "kube_token_file": api.token_file, "kube_ca_file": api.ca_file}
    here.start(backend, **{**access, "cni_install": "off", "own_namespace": "sluice-system", **changes})


def started(here: Node, api: ApiServer, name: str) -> NodePod:
    pod = here.pod(name, enrolled=False)
    told = {"namespace": pod.namespace, "uid": pod.uid}
    api.put(objects.pod(pod.name, **told, phase="Pending", address=""))
    here.add(pod)
    api.put(objects.pod(pod.name, **told, address=pod.ipv4))
    return pod


def known(here: Node, pod: NodePod) -> bool:
    """Whether anything is noted of it."""
    return (here.run_dir / "pods" / f"{pod.uid}.json").exists()


def shown(api: ApiServer, pod: NodePod) -> list[str]:
    """Every value that the pod's annotation ever had, in order, as a follower of the API saw them."""
    objects = (change.object for change in list(api.store.history) if change.resource == "pods")
    metadata = (one["metadata"] for one in objects if one["metadata"]["uid"] == pod.uid)
    values = [one.get("annotations", {}).get(names.REDIRECTION, "") for one in metadata]
    return [value for at, value in enumerate(values) if at == 0 or values[at - 1] != value]


def test_a_pod_that_stays_captured_shows_enabled_and_nothing_else(here: Node, api: ApiServer) -> None:
    start(here, api)
    here.processes.start_ztunnel()
    here.await_ztunnel()
    pod = started(here, api, "web")
    until(lambda: shown(api, pod)[-1] == "enabled", "it is annotated")
    since = len(shown(api, pod))

    def step(what: str) -> None:
        enabled(here, pod)
        assert here.captured(pod)
        assert shown(api, pod)[since:] == [], what

    for stop in (here.processes.end, here.processes.kill):
        stop()
        start(here, api)
        step(f"the agent: {stop.__name__}")
    here.processes.kill()
    for path in (here.run_dir / "netns").iterdir():
        unpin(path)
    shutil.rmtree(here.run_dir / "pods")  # as an agent that takes over from another one: it knows nothing
    start(here, api)
    step("the agent has no notes")
    here.processes.end()
    api.fault("list", "status", path="/api/v1/namespaces", times=2)
    start(here, api)
    step("namespaces were known later than pods")
    here.processes.start_ztunnel("ztunnel2")
    here.await_ztunnel(2)
    here.processes.end("ztunnel")
    here.await_ztunnel()
    step("ztunnel was replaced")
    here.processes.kill("ztunnel2")
    until(lambda: here.state(pod) == "pending", "nobody listens in it")
    here.processes.start_ztunnel()
    here.await_ztunnel()
    step("ztunnel was killed")
    for backend in (LabBackend.EBPF, LabBackend.NFTABLES):
        here.processes.end()
        start(here, api, backend)
        step(f"the backend is {backend} now")
    here.processes.end()
    here.sluice("handback", "--all", "--netns", str(pod.netns))
    assert here.captured(pod) and not known(here, pod), "istio-cni's form, and nobody's note"
    start(here, api)
    step("it was handed back and taken over")
    here.delete(pod)


def test_what_istio_cnis_agent_wrote_is_left_while_it_runs_and_taken_back_after_it(here: Node, api: ApiServer) -> None:
    """A pod that we would not capture: to take its annotation would make the other agent take its rules, too."""
    here.processes.end()
    with tempfile.TemporaryDirectory(prefix="slu-root-") as root, socket.socket(socket.AF_UNIX) as theirs:
        place = Path(root + RUN_DIR)
        place.mkdir(parents=True)
        theirs.bind(str(place / "pluginevent.sock"))
        theirs.listen()
        if (ztunnel := here.children.get("node1.ztunnel")) is None or not ztunnel.alive:
            here.processes.start_ztunnel()
        start(here, api, host_root=root)
        pod = here.pod("theirs", namespace="other", enrolled=False)
        told = objects.pod("theirs", namespace="other", uid=pod.uid, address=pod.ipv4)
        told["metadata"]["annotations"] = {names.REDIRECTION: "enabled"}
        api.put(told)
        until(lambda: "istio-cni's agent runs here" in here.ask("/v1/status")["kubernetes"], "it is said")
        assert here.state(pod) == "excluded" and shown(api, pod) == ["enabled"]
        theirs.close()
        until(lambda: shown(api, pod) == ["enabled", ""], "it is taken back")
        until(lambda: here.ask("/v1/status")["kubernetes"] == "ok", "nothing is said any more")
        here.processes.end()
    here.remove(pod)
