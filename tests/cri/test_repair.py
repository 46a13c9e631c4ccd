# SPDX-License-Identifier: Apache-2.0
"""Pods that a runtime started with no Sluice in its chain: the agent finds and captures them, without a restart."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

import pytest
from support import apiserver_objects as objects
from support.apiserver import ApiServer
from support.crinode import CriNode, CriPod, Sandbox, crinode, until

from agent.core.names import DATAPLANE_MODE
from agent.kernel.netns import CLONE_NEWNET, Netns

pytestmark = pytest.mark.root
AMBIENT = {DATAPLANE_MODE: "ambient"}


@pytest.fixture(scope="module")
def made() -> Iterator[CriNode]:
    """Without agent, and with the primary's list alone."""
    with crinode("slucrr") as made:
        made.path("/etc/cni/net.d/02-sluice.conflist").unlink()
        made.start_containerd()
        until(made.configured, "the runtime has the primary's list")
        made.start_web()
        yield made


@pytest.fixture(scope="module")
def api(made: CriNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """Its thread, and so its sockets, are in the node's namespace."""
    with Netns.open(made.host.netns) as inside:
        server = ApiServer(tmp_path_factory.mktemp("api"))
        server._thread.start()
        server.on_loop(lambda: _enter(inside.fd))
        server.up()
    try:
        server.put(objects.namespace("shop", **AMBIENT))
        server.put(objects.namespace("plain"))
        server.put(objects.node("node1"))
        yield server
    finally:
        server.stop()


def _enter(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def tell(api: ApiServer, sandbox: Sandbox, container: str, *, address: str | None = None) -> None:
    """The pod as the kubelet reports it; its address may be missing for a while."""
    pod = sandbox.pod
    facts: dict[str, Any] = {"namespace": pod.namespace, "uid": pod.uid, "host_network": pod.host_network}
    value = objects.pod(pod.name, address=sandbox.ip if address is None else address, **facts)
    value["status"]["containerStatuses"][0]["containerID"] = f"containerd://{container}"
    api.put(value)


def start_agent(here: CriNode, api: ApiServer, **changes: Any) -> None:
    here.start_ztunnel()
    here.start_agent(**{**access(api), **changes})
    here.await_ztunnel()


def access(api: ApiServer) -> dict[str, str]:
    return {"kube_server": api.url, "kube_token_file": api.token_file, "kube_ca_file": api.ca_file}


def started(here: CriNode, name: str, **facts: Any) -> tuple[Sandbox, str]:
    sandbox = here.run(CriPod(name, enrolled=False, **facts))
    return sandbox, here.client(sandbox)


def test_p02_p06_p54_pods_older_than_the_agent_are_captured(made: CriNode, api: ApiServer) -> None:
    here, web = made, "192.0.2.53"
    known, late = started(here, "known"), started(here, "late")  # the API server does not tell `late`'s address yet
    lone = started(here, "lone")
    plain, host = started(here, "plain", namespace="plain"), started(here, "host", host_network=True)
    os.kill(pause(here, lone[0]), 9)  # as with CRI-O's drop_infra_ctr: only the container holds the namespace
    for one in (known, lone, plain, host):
        tell(api, *one)
    tell(api, *late, address="")
    start_agent(here, api, cni_install="own")
    for sandbox, inside in (known, late, lone):
        until(lambda: here.state(sandbox.pod) == "enabled", f"{sandbox.pod.name} is captured", 5)  # noqa: B023
        assert here.captured(sandbox, inside, web)
    tell(api, *late)
    assert "redirect" not in here.host.run(["nft", "list", "ruleset"]).stdout  # nothing but the probes' exemption
    assert here.rules(plain[0]) == ""
    assert here.state(host[0].pod) in ("", "excluded")
    until(here.configured, "the runtime has our list now")
    pod = CriPod("fresh", enrolled=False)  # its namespace's label enrols it
    api.put(objects.pod(pod.name, namespace=pod.namespace, uid=pod.uid, phase="Pending"))
    fresh = here.run(pod)
    assert here.state(pod) == "enabled"
    tell(api, fresh, here.client(fresh))
    for sandbox in (known[0], late[0], lone[0], plain[0], host[0], fresh):
        here.remove(sandbox)
        api.delete("Pod", sandbox.pod.namespace, sandbox.pod.name)
    here.nothing_left()
    with contextlib.suppress(AssertionError):
        until(lambda: here.ask("/v1/pods") == [], "the agent has forgotten them")
    known_still = [(row["name"], row["state"], row["error"]) for row in here.ask("/v1/pods")]
    assert known_still == []


def test_pod_of_unknown_address_is_forgotten_when_it_ends(made: CriNode, api: ApiServer) -> None:
    """Its DEL went through a chain without us, so that the API server's word and the empty namespace have to do."""
    here = made
    ours = here.path("/etc/cni/net.d/02-sluice.conflist")
    here.end()
    ours.unlink()
    until(here.configured, "the runtime has the primary's list")
    sandbox, inside = started(here, "nowhere")
    tell(api, sandbox, inside, address="")
    here.start_agent(**access(api))
    until(lambda: here.state(sandbox.pod) == "enabled", "it is captured")
    here.remove(sandbox)
    api.delete("Pod", "shop", "nowhere")
    try:
        here.nothing_left(3)
    finally:
        here.end()


def pause(here: CriNode, sandbox: Sandbox) -> int:
    """The pid of the sandbox's own process."""
    return int(here.info(sandbox.id)["pid"])
