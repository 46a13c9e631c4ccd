# SPDX-License-Identifier: Apache-2.0
"""The whole agent with an API server in its node: labels and annotations decide, live, and nothing starts unseen."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import apiserver_objects as objects
from support.apiserver import ApiServer
from support.apiserver_inside import served
from support.field import Inside, Stream, enabled, metric
from support.node import PORT, Node, NodePod, node, until

from agent.core import names
from agent.core.errors import SluiceError
from agent.kernel.exec import run
from agent.kernel.netns import Netns

pytestmark = pytest.mark.root
AMBIENT = {names.DATAPLANE_MODE: "ambient"}
NONE = {names.DATAPLANE_MODE: "none"}


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with node("slukub") as made:
        yield made


@pytest.fixture(scope="module")
def server(here: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with served(here.netns, tmp_path_factory.mktemp("api")) as made:
        yield made


@pytest.fixture
def api(here: Node, server: ApiServer) -> ApiServer:
    """Namespaces are as they were at first; an agent and a ztunnel run."""
    server.put(objects.namespace("shop", **AMBIENT))
    server.put(objects.namespace("plain"))
    server.faults.clear()
    agent, ztunnel = (here.children.get(f"node1.{name}") for name in ("agent", "ztunnel"))
    if agent is None or not agent.alive:
        start(here, server)
    if ztunnel is None or not ztunnel.alive:
        here.processes.start_ztunnel()
    here.await_ztunnel()
    until(lambda: here.ask("/v1/status")["ready"] and not here.ask("/v1/pods"), "ready, with no pod left")
    return server


def start(here: Node, server: ApiServer, **changes: Any) -> None:
    access = {"kube_server": server.url, "kube_token_file": server.token_file, "kube_ca_file": server.ca_file}
    here.start(**{**access, "cni_install": "off", "own_namespace": "sluice-system", **changes})


def told(pod: NodePod, **facts: Any) -> dict[str, Any]:
    """The pod as the API server has it."""
    return objects.pod(pod.name, namespace=pod.namespace, uid=pod.uid, **{"address": pod.ipv4, **facts})


def made(here: Node, api: ApiServer, name: str, namespace: str = "shop", **facts: Any) -> NodePod:
    """A pod in the API that nothing says of at the runtime, with its network; not added yet."""
    pod = here.pod(name, namespace=namespace, enrolled=False)
    api.put(told(pod, phase="Pending", address="", **facts))
    return pod


def started(here: Node, api: ApiServer, name: str, namespace: str = "shop", **facts: Any) -> NodePod:
    """The same, added by the runtime and running by the API."""
    pod = here.add(made(here, api, name, namespace, **facts))
    api.put(told(pod, **facts))
    return pod


def ended(here: Node, api: ApiServer, *pods: NodePod) -> None:
    for pod in pods:
        here.delete(pod)
        api.delete("Pod", pod.namespace, pod.name)


def watched(here: Node) -> float:
    """Events of this node's pods that the agent took so far."""
    return metric(here, "sluice_kube_follow_total", path="/api/v1/pods", what="events")


def annotation(api: ApiServer, pod: NodePod) -> str:
    for found in api.objects("pods"):
        if found["metadata"]["name"] == pod.name:
            return found["metadata"].get("annotations", {}).get(names.REDIRECTION, "")
    return "no such pod"


def annotated(api: ApiServer, pod: NodePod, value: str) -> None:
    until(lambda: annotation(api, pod) == value, f"{pod.name} is annotated {value!r}")


def test_labels_of_namespace_and_pod_decide_live_and_the_annotation_follows(here: Node, api: ApiServer) -> None:
    pod, plain, other = (
        started(here, api, "web"),
        started(here, api, "lone", "plain"),
        started(here, api, "no", labels=NONE),
    )
    enabled(here, pod)
    assert here.captured(pod) and here.captured(pod, 6)
    annotated(api, pod, "enabled")
    assert (here.state(plain), here.state(other)) == ("excluded", "excluded")
    assert plain.ruleset() == other.ruleset() == ""
    api.put(objects.namespace("plain", **AMBIENT))
    enabled(here, plain)
    assert here.captured(plain)
    annotated(api, plain, "enabled")
    api.put(told(plain, labels=NONE, annotations={names.REDIRECTION: "enabled"}))
    here.left(plain, "the pod's own label is honoured")
    assert plain.ruleset() == ""
    annotated(api, plain, "")
    api.put(told(other, labels=AMBIENT))
    enabled(here, other)
    assert {one.path.rpartition("/")[2] for one in api.patches} == {"status"}
    ended(here, api, pod, plain, other)
    assert not here.known(pod)


def test_annotations_change_what_is_captured_live(here: Node, api: ApiServer) -> None:
    pod = started(here, api, "annotated")
    with Stream(pod.netns, here.netns, here.host(pod), 9999) as captured:
        api.put(told(pod, annotations={"traffic.sluice.io/exclude-outbound-ports": str(PORT)}))
        until(lambda: not here.captured(pod), "the port is left out")
        assert captured.alive()
    api.put(told(pod))
    until(lambda: here.captured(pod), "it is captured again")
    ended(here, api, pod)


def test_p06_a_pod_that_was_there_before_the_agent_is_captured_without_restart(here: Node, api: ApiServer) -> None:
    here.processes.end()
    late, absent = here.pod("before", enrolled=False), here.pod("absent", enrolled=False)
    listener = Inside(late.netns).listen(late.ipv4, PORT)
    api.put(told(late))
    here.remove(absent)
    api.put(told(absent))  # as after a reboot: its sandbox is still to be made anew
    start(here, api)
    enabled(here, late)
    until(lambda: here.state(absent) == "failed", "it is not found")
    assert "absent" in here.log and not [line for line in here.log.splitlines() if "absent" in line and "ERROR" in line]
    api.delete("Pod", absent.namespace, absent.name)
    until(lambda: here.ask("/v1/explain", pod=late.key)["probe"].endswith(": ok"), "the canary came after ztunnel")
    assert here.ask("/v1/explain", pod=late.key)["netns"].startswith(("/proc/", "/run/netns/"))
    listener.close()
    assert here.captured(late) and here.captured(late, 6)
    annotated(api, late, "enabled")
    while_running = here.pod("missed", enrolled=False)  # its ADD never reached us
    api.put(told(while_running))
    enabled(here, while_running)
    assert here.captured(while_running)
    here.processes.kill()
    start(here, api)
    enabled(here, late, while_running)
    for pod in (late, while_running):
        api.delete("Pod", pod.namespace, pod.name)
    time.sleep(0.3)
    assert here.captured(late)  # its object is gone, its containers are not
    for pod in (late, while_running):
        here.remove(pod)
        until(lambda pod=pod: not here.known(pod), "its end is noticed")


def test_p02_a_sandbox_that_was_rebuilt_without_an_add_is_captured(here: Node, api: ApiServer) -> None:
    pod = started(here, api, "rebuilt")
    here.remove(pod)
    again = here.pod("rebuilt", number=pod.number, enrolled=False, uid=pod.uid)
    api.put(told(again, labels={"any": "change"}))
    until(lambda: again.ruleset(), "its new namespace is found")
    enabled(here, again)
    assert here.captured(again)
    ended(here, api, again)


def test_p05_the_startup_taint_goes_when_no_enrolled_pod_can_start_uncaptured(here: Node, api: ApiServer) -> None:
    taint = {"key": "sluice.io/not-ready", "effect": "NoSchedule"}
    api.put(objects.node("node1", [{"key": "other", "effect": "NoExecute"}, taint]))
    here.processes.end("ztunnel")
    here.processes.end()
    start(here, api, startup_taint="sluice.io/not-ready:NoSchedule", startup_taint_returns=True, add_seconds=1)

    def taints() -> list[str]:
        return [one["key"] for node in api.objects("nodes") for one in node["spec"].get("taints", [])]

    # ztunnel itself may wait for what waits for the taint; an enrolled pod does not start without it anyway.
    until(lambda: taints() == ["other"], "the taint is taken away")
    pod = made(here, api, "early")
    assert here.cni("ADD", pod).error == 11
    here.processes.start_ztunnel()
    here.await_ztunnel()
    here.add(pod)
    assert here.captured(pod)
    ended(here, api, pod)
    here.processes.end()
    api.put(objects.node("node1"))
    here.processes.end("ztunnel")


def test_p09_while_the_api_is_away_nothing_that_may_be_enrolled_starts(here: Node, api: ApiServer) -> None:
    before = watched(here)
    seen = made(here, api, "seen")
    until(lambda: watched(here) > before, "the watch has brought it")
    api.down()
    assert here.cni("ADD", seen).code == 0  # the watch has brought it
    unseen, plain = here.pod("unseen", enrolled=False), here.pod("plain", namespace="plain", enrolled=False)
    unknown, own = (
        here.pod("x", namespace="new", enrolled=False),
        here.pod("x", namespace="sluice-system", enrolled=False),
    )
    for pod in (unseen, unknown):
        outcome = here.cni("ADD", pod)
        assert outcome.error == 11 and pod.key in outcome.words
        assert "cannot decide whether to capture it" in outcome.words
        assert pod.ruleset() == "" and here.cni("DEL", pod).code == 0
    assert here.cni("ADD", plain).code == here.cni("ADD", own).code == 0
    api.up()
    api.put(told(unseen, phase="Pending", address=""))
    here.add(unseen)
    assert here.captured(unseen)
    for pod in (seen, unseen, plain, unknown, own):
        here.delete(pod)


@pytest.mark.parametrize("status", [403, 500])
def test_p09_an_api_that_refuses_is_as_one_that_is_away(here: Node, api: ApiServer, status: int) -> None:
    pod = here.pod("refused", enrolled=False)
    api.fault("read", "status", path="/pods/", code=status, times=100)
    outcome = here.cni("ADD", pod)
    assert outcome.error == 11 and str(status) in outcome.words
    here.delete(pod)


def test_p09_with_the_agent_down_only_what_is_not_enrolled_starts(here: Node, api: ApiServer) -> None:
    exempt = here.run_dir / "exempt"
    until(lambda: {path.name for path in exempt.iterdir()} == {"kube-system", "plain", "sluice-system"}, "it is noted")
    here.processes.kill()
    pods = {name: here.pod("x", namespace=name, enrolled=False) for name in ("shop", "plain", "sluice-system", "new")}
    outcomes = {name: here.cni("ADD", pod).error for name, pod in pods.items()}
    assert outcomes == {"shop": 11, "plain": 0, "sluice-system": 0, "new": 11}
    for pod in pods.values():
        assert here.cni("DEL", pod).code == 0
        here.remove(pod)
    start(here, api)


def test_jobs_and_deleted_pods_keep_their_rules_while_a_container_runs(here: Node, api: ApiServer) -> None:
    job = started(here, api, "job")
    running = told(job)
    running["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:00Z"
    api.put(running)
    running["status"]["phase"] = "Failed"  # evicted, and its container not ended yet
    api.put(running)
    time.sleep(0.3)
    here.ask("/v1/verify", "POST", pod=job.uid)
    assert here.state(job) == "enabled" and here.captured(job)
    api.put(told(job, phase="Succeeded"))
    here.left(job, "it has ended")
    assert job.ruleset() == ""
    ended(here, api, job)


def test_host_network_pods_and_static_pods(here: Node, api: ApiServer) -> None:
    api.put(objects.pod("proxy", uid="host-1", host_network=True, address="10.0.0.1"))
    until(lambda: here.ask("/v1/pods"), "it is known")
    assert "shares the host's network" in here.sluice("explain", "shop/proxy")
    static = here.pod("static-node1", enrolled=False)
    mirror = told(static, annotations={"kubernetes.io/config.mirror": static.uid}, phase="Pending", address="")
    mirror["metadata"]["uid"] = "mirror-uid"
    api.put(mirror)
    here.add(static)
    assert here.captured(static)
    annotated(api, static, "enabled")
    ended(here, api, static)
    api.delete("Pod", "shop", "proxy")


def test_drift_and_failure_are_events_on_the_pod(here: Node, api: ApiServer) -> None:
    pod = started(here, api, "events")
    run(["ip", "rule", "del", "pref", "32764"], netns=pod.netns)
    until(lambda: any(event["reason"] == "CaptureRepaired" for event in api.events), "the repair is told")
    event = next(event for event in api.events if event["reason"] == "CaptureRepaired")
    assert event["involvedObject"]["uid"] == pod.uid
    assert "changed routing" in event["message"] and "32764" in event["message"]
    ended(here, api, pod)


def test_the_api_server_restarts_and_renews_the_token_and_nothing_is_missed(here: Node, api: ApiServer) -> None:
    pod = started(here, api, "through")
    api.down()
    api.renew_token(revoke=True)
    api.up()
    api.put(objects.namespace("shop"))
    here.left(pod, "the watch came back")
    api.drop()
    api.compact()
    api.put(objects.namespace("shop", **AMBIENT))
    enabled(here, pod)
    assert here.captured(pod)
    until(lambda: here.ask("/v1/status")["kubernetes"] == "ok", "the watch of pods came back, too")
    ended(here, api, pod)


def test_without_the_api_at_its_start_the_agent_keeps_what_it_has_and_says_so(here: Node, api: ApiServer) -> None:
    pod = started(here, api, "kept")
    api.down()
    here.processes.kill()
    assert here.captured(pod)
    here.processes.begin_agent()
    until(lambda: asked(here) and here.state(pod) == "enabled", "what was noted is looked at")
    until(lambda: "not known from Kubernetes yet" in here.ask("/v1/status")["problem"], "it waits no longer")
    assert not here.ask("/v1/status")["ready"]
    enabled(here, pod)
    assert here.captured(pod)
    api.up()
    until(lambda: here.ask("/v1/status")["ready"], "it is ready once the API has answered")
    enabled(here, pod)
    ended(here, api, pod)


def asked(here: Node) -> bool:
    """Whether the agent answers already."""
    try:
        return bool(here.ask("/v1/status"))
    except SluiceError:
        return False


def test_debug_on_tcp_answers_who_may_list_the_pods_alone(here: Node, api: ApiServer, tmp_path: Path) -> None:
    shop, plain = started(here, api, "mine"), started(here, api, "theirs", "plain")
    assert debug(here, "/debug/pods", "") == (401, "a bearer token is required (kubectl create token ...)\n")
    assert debug(here, "/debug/pods", "nonsense")[0] == 403
    reader, admin = bearer(api, "shop"), bearer(api, "")
    status, body = debug(here, "/debug/pods", reader)
    assert status == 200 and [row["name"] for row in json.loads(body)] == ["mine"]
    assert {row["name"] for row in json.loads(debug(here, "/debug/pods", admin)[1])} == {"mine", "theirs"}
    assert json.loads(debug(here, "/debug/explain?pod=shop/mine", reader)[1])["decision"] == "enrolled"
    assert debug(here, "/debug/explain?pod=plain/theirs", reader)[0] == 404
    assert debug(here, "/debug/connections?pod=shop/mine", reader)[0] == 200
    ended(here, api, shop, plain)


def bearer(api: ApiServer, namespace: str) -> str:
    """A token of somebody who may list pods there; "" for everywhere."""
    token = f"token-of-{namespace or 'admin'}"
    api.rights.users[token] = {"username": token}
    api.rights.grants.add((token, "list", namespace, "pods"))
    return token


def debug(here: Node, path: str, token: str) -> tuple[int, str]:
    """Status and body, asked for over TCP in the node."""
    connection = http.client.HTTPConnection("127.0.0.1", 15014)
    with Netns.open(here.netns) as inside:
        connection.sock = inside.call(socket.socket)
    connection.sock.connect(("127.0.0.1", 15014))
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_agent_tells_what_it_knows_of_kubernetes_in_its_metrics(here: Node, api: ApiServer) -> None:
    assert metric(here, "sluice_kube_follow_total", path="/api/v1/pods", what="lists") >= 1
    assert metric(here, "sluice_kube_synced") == 1
