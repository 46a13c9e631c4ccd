# SPDX-License-Identifier: Apache-2.0
"""What a container runtime sees of `sluice-cni`, and what the agent sees of it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import struct
from pathlib import Path

import pytest

from agent.core.settings import Settings
from agent.install.conflists import VERSIONS, plugin_entry
from agent.sources.cni import wire
from agent.sources.cni.wire import MAX_REPLY, CniReply, CniVerb, frame

VERBS = ("ADD", "CHECK", "STATUS", "GC")
POD_ANNOTATIONS = "io.kubernetes.cri.pod-annotations"


# What goes through


def test_add_passes_everything_on_and_prints_prev_result(plugin, agent):
    config = plugin.config(runtimeConfig={POD_ANNOTATIONS: {"a/b": "ü"}})
    done = plugin("ADD", config)
    assert (done.code, done.json) == (0, config["prevResult"])
    (request,) = agent.requests
    assert (request.verb, request.container_id, request.ifname) == (CniVerb.ADD, "c0ffee", "eth0")
    assert (request.pod_namespace, request.pod_name, request.pod_uid) == ("shop", "web-0", "6f1c-ab")
    assert request.addresses == ("10.9.0.7", "fd00:9::7")
    assert request.annotations == {"a/b": "ü"}
    assert request.netns == "/proc/self/ns/net"
    assert request.config == config


@pytest.mark.parametrize("verb", ["ADD", "DEL", "CHECK"])
def test_the_passed_descriptor_is_the_namespace(plugin, agent, verb):
    assert plugin(verb).code == 0
    status = Path("/proc/self/ns/net").stat()
    assert agent.files == [(status.st_dev, status.st_ino)]


@pytest.mark.parametrize("verb", ["DEL", "CHECK", "STATUS", "GC"])
def test_other_verbs_print_nothing_when_all_is_well(plugin, agent, verb):
    done = plugin.ask(verb)
    assert (done.code, done.stdout) == (0, b"")
    assert [request.verb for request in agent.requests] == [verb]


def test_status_and_gc_need_no_container_and_pass_no_descriptor(plugin, agent):
    nothing = dict.fromkeys(("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"))
    for verb in ("STATUS", "GC"):
        assert plugin(verb, plugin.config_for(verb), **nothing).code == 0
    assert agent.files == [None, None]
    assert agent.requests[1].valid_attachments == (("c0ffee", "eth0"),)


def test_prev_result_is_unchanged(plugin, agent):
    result = {
        "zeta": [1, 2**53 + 1, -(2**63), 0.1, 1e-7, 1e22, None, True, {}, []],
        "cniVersion": "1.1.0",
        "ips": [{"address": "10.9.0.7/24", "x-unknown": {"deep": [[['ß\u0001\u0000\U0001f419"\\/']]]}}],
        "alpha": "",
    }
    done = plugin("ADD", plugin.config(prevResult=result))
    assert done.json == result
    assert list(done.json) == list(result)


def test_prev_result_is_printed_in_the_version_asked_for(plugin, agent):
    done = plugin("ADD", plugin.config(cniVersion="0.4.0", prevResult={"ips": []}))
    assert done.json == {"cniVersion": "0.4.0", "ips": []}


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_supported_versions(plugin, agent, version):
    assert plugin("ADD", plugin.config(cniVersion=version)).code == 0
    done = plugin("VERSION", {"cniVersion": version})
    assert done.json == {"cniVersion": version, "supportedVersions": list(VERSIONS)}


@pytest.mark.parametrize("stdin", [b"", b"{", b"[]", b'{"cniVersion": "9.9.9"}', b'{"cniVersion": 1}'])
def test_version_answers_whatever_it_is_given(plugin, stdin):
    done = plugin("VERSION", stdin)
    assert (done.code, done.json["cniVersion"]) == (0, "1.1.0")


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_args_in_any_order(plugin, agent, order):
    pairs = ["K8S_POD_UID=u-1", "K8S_POD_NAMESPACE=shop", "IgnoreUnknown=1", "K8S_POD_NAME=web"]
    args = ";".join(pairs[i] for i in order)
    assert plugin("ADD", CNI_ARGS=args).code == 0
    (request,) = agent.requests
    assert (request.pod_namespace, request.pod_name, request.pod_uid) == ("shop", "web", "u-1")
    config = plugin.config(socket="/nonexistent/cni.sock")
    plugin("ADD", config, CNI_ARGS=args).failed(11, "pod shop/web: connect /nonexistent/cni.sock")


def test_the_largest_configuration_goes_through_and_one_byte_more_does_not(plugin, agent):
    config = plugin.config(filler="")
    config["filler"] = "x" * (1024 * 1024 - len(json.dumps(config)))
    assert plugin("ADD", config).code == 0
    assert agent.requests[0].config == config
    config["filler"] += "x"
    plugin("ADD", config).failed(7, "larger than 1048576 bytes")


def test_a_request_that_grows_beyond_the_limit_is_refused(plugin, agent):
    config = plugin.config(filler=[])
    text = json.dumps(config).replace("[]", "[" + ",".join(["1e9"] * 200_000) + "]", 1)
    plugin("ADD", text.encode()).failed(11, "larger than")
    assert agent.requests == []


def test_a_fifo_for_a_namespace_does_not_hang(plugin, agent, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert plugin("ADD", CNI_NETNS=str(tmp_path / "fifo")).code == 0
    status = (tmp_path / "fifo").stat()
    assert agent.files == [(status.st_dev, status.st_ino)]


# What the agent refuses


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("code", [3, 7, 11, 50, 51, wire.DRIFT])
def test_the_agents_refusal_is_passed_on(plugin, agent, verb, code):
    agent.answer = CniReply(code, "ünfit\nwords", "de\ttails")
    error = plugin.ask(verb).failed(code)
    assert (error["msg"], error["details"], error["cniVersion"]) == ("ünfit\nwords", "de\ttails", "1.1.0")


def test_the_largest_answer_is_passed_on(plugin, agent):
    agent.answer = CniReply(100, "drift", "-A rule\n" * 100_000)
    details = plugin("CHECK").failed(100, "drift")["details"]
    assert len(details) > 10_000
    assert ("-A rule\n" * 100_000).startswith(details)


def test_the_agents_refusal_is_not_overruled_by_an_exempt_file(plugin, agent):
    plugin.exempt("shop")
    agent.answer = CniReply(11, "not now")
    plugin("ADD").failed(11, "not now")


MALFORMED = {
    "closed": b"",
    "half a header": b"\0\0",
    "half a payload": frame(b'{"code":0}')[:-1],
    "empty": frame(b""),
    "too large": struct.pack(">I", MAX_REPLY + 1) + b" " * (MAX_REPLY + 1),
    "not JSON": frame(b"{code:0}"),
    "a list": frame(b"[0]"),
    "no code": frame(b'{"msg":"x"}'),
    "code is text": frame(b'{"code":"0"}'),
    "code is real": frame(b'{"code":0.0}'),
    "code is false": frame(b'{"code":false}'),
    "code is negative": frame(b'{"code":-1}'),
    "code is huge": frame(b'{"code":4294967296}'),
    "msg is a number": frame(b'{"code":11,"msg":5}'),
    "details is a list": frame(b'{"code":11,"msg":"","details":[]}'),
    "not UTF-8": frame(b'{"code":11,"msg":"\xff"}'),
}


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_answer_is_no_answer(plugin, agent, answer):
    agent.answer = answer
    plugin("ADD").failed(11, "pod shop/web-0: receive from", str(plugin.socket))
    plugin("CHECK").failed(11, "pod shop/web-0: receive from")
    plugin.ask("STATUS").failed(50, "receive from")
    plugin.ask("GC").failed(11, "receive from")
    done = plugin("DEL")
    assert (done.code, done.stdout) == (0, b"")
    plugin.exempt("shop")
    assert plugin("ADD").code == 0


# Nobody answers


@pytest.mark.parametrize(("verb", "code"), [("ADD", 11), ("CHECK", 11), ("STATUS", 50), ("GC", 11)])
def test_agent_down(plugin, verb, code):
    error = plugin.ask(verb).failed(code, f"connect {plugin.socket}: No such file or directory")
    assert "sluice status" in error["details"]


def test_agent_died_and_left_its_socket(plugin, agent):
    agent.close()
    plugin("ADD").failed(11, f"pod shop/web-0: connect {plugin.socket}: Connection refused")


def test_pod_without_kubernetes_is_named_by_its_container(plugin):
    plugin("ADD", CNI_ARGS=None).failed(11, "pod of container c0ffee: connect")
    plugin("ADD", CNI_ARGS="K8S_POD_NAME=web").failed(11, "pod of container c0ffee: connect")


def test_an_agent_that_never_answers_is_bounded(plugin, agent):
    agent.answer = None
    plugin("ADD", plugin.config(timeoutSeconds=1)).failed(11, "receive from", "no answer in time")
    assert plugin("DEL", plugin.config(timeoutSeconds=1)).code == 0
    assert len(agent.requests) == 2


@pytest.fixture
def full_socket(plugin):
    """A listener that nobody serves and whose queue is full: not even connect comes through."""
    plugin.socket.parent.mkdir()
    waiting: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(plugin.socket))
        listener.listen(0)
        while True:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            waiting.append(client)
            client.setblocking(False)
            try:
                client.connect(str(plugin.socket))
            except BlockingIOError:
                break
        yield
    for client in waiting:
        client.close()


def test_an_agent_that_never_accepts_is_bounded(plugin, full_socket):
    plugin("ADD", plugin.config(timeoutSeconds=1)).failed(11, "connect", "not accepted in time")


def test_standard_input_that_never_ends_is_bounded_for_del(plugin):
    # The pipe's writing end stays open here for the whole call.
    reading, writing = os.pipe()
    try:
        done = plugin("DEL", b"", enter=lambda: os.dup2(reading, 0))
    finally:
        os.close(reading)
        os.close(writing)
    assert (done.code, done.stdout) == (0, b"")


# Namespaces that do not need the agent


@pytest.mark.parametrize("verb", ["ADD", "CHECK"])
def test_excluded_namespace_never_asks_the_agent(plugin, agent, verb):
    agent.answer = CniReply(11, "not now")
    done = plugin(verb, plugin.config(excludeNamespaces=["kube-system", "shop"]))
    assert done.code == 0
    assert (json.loads(done.stdout) if done.stdout else None) == (
        plugin.config()["prevResult"] if verb == "ADD" else None
    )
    assert agent.requests == []


def test_other_namespaces_are_not_excluded(plugin, agent):
    agent.answer = CniReply(11, "not now")
    for names in ([], ["sho"], ["shop2"], ["web-0"]):
        plugin("ADD", plugin.config(excludeNamespaces=names)).failed(11, "not now")


def test_del_of_an_excluded_pod_still_reaches_the_agent(plugin, agent):
    assert plugin("DEL", plugin.config(excludeNamespaces=["shop"])).code == 0
    assert len(agent.requests) == 1


EXEMPT = ["istio-system/ztunnel-*", "shop/web-0", "shop/api.*"]


@pytest.mark.parametrize("verb", ["ADD", "CHECK"])
@pytest.mark.parametrize(
    "args",
    [
        "K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=ztunnel-abc12",
        "K8S_POD_NAME=ztunnel-;K8S_POD_NAMESPACE=istio-system",
        "K8S_POD_NAMESPACE=shop;IgnoreUnknown=1;K8S_POD_NAME=web-0",
        "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=api.v1",
    ],
)
def test_p14_p15_p18_exempt_pods_start_with_no_agent_and_an_empty_run(plugin, verb, args):
    """CNI_ARGS alone decides, also when the pod's annotation asks for capture: no agent would capture it either."""
    annotations = {POD_ANNOTATIONS: {"istio.io/dataplane-mode": "ambient"}}
    config = plugin.config(exemptPods=EXEMPT, runtimeConfig=annotations, socket="/nonexistent/run/cni.sock")
    done = plugin(verb, config, CNI_ARGS=args)
    assert done.code == 0
    assert (done.json if verb == "ADD" else done.stdout) == (plugin.config()["prevResult"] if verb == "ADD" else b"")


@pytest.mark.parametrize(
    "args",
    [
        "K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=ztunnel",
        "K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=my-ztunnel-1",
        "K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=",
        "K8S_POD_NAMESPACE=istio-system",
        "K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=ztunnel-/../x",
        "K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=ztunnel-" + "x" * 300,
        "K8S_POD_NAMESPACE=istio-syste;K8S_POD_NAME=ztunnel-1",
        "K8S_POD_NAMESPACE=istio-system2;K8S_POD_NAME=ztunnel-1",
        "K8S_POD_NAME=ztunnel-1",
        "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-00",
        "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-",
        "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=*",
        "K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=ztunnel-1;K8S_POD_NAME=shop",
        "",
    ],
)
def test_no_other_pod_is_exempt(plugin, args):
    plugin("ADD", plugin.config(exemptPods=EXEMPT), CNI_ARGS=args).failed(11, "connect ")


def test_what_the_installer_writes_is_what_the_plugin_takes(plugin, agent):
    exempt = ("istio-system/ztunnel-*", "shop/api.*")
    settings = Settings(own_namespace="sluice", exclude_namespaces=("shop", "a.b", "X"), exempt_pods=exempt)
    config = plugin.config(**{**plugin_entry(settings), "socket": str(plugin.socket)})
    assert plugin("ADD", config, CNI_ARGS="K8S_POD_NAMESPACE=bank;K8S_POD_NAME=x").code == 0
    assert len(agent.requests) == 1
    for args in ("K8S_POD_NAMESPACE=shop", "K8S_POD_NAMESPACE=sluice", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=api.1"):
        assert plugin("ADD", config, CNI_ARGS=args).code == 0
    assert len(agent.requests) == 1


def test_del_of_an_exempt_pod_still_reaches_the_agent(plugin, agent):
    assert plugin("DEL", plugin.config(exemptPods=["shop/web-0"])).code == 0
    assert len(agent.requests) == 1


def test_a_second_add_with_a_result_of_ours_is_a_success(plugin, agent):
    """Two insertion points, as with Multus: what we printed comes back as prevResult, and is printed again."""
    first = plugin("ADD")
    second = plugin("ADD", plugin.config(prevResult=first.json))
    assert (second.code, second.json) == (0, first.json)


def test_exempt_file(plugin):
    plugin.exempt("shop")
    done = plugin("ADD")
    assert (done.code, done.json) == (0, plugin.config()["prevResult"])
    assert plugin("CHECK").code == 0
    for args in ("K8S_POD_NAMESPACE=shop2", "K8S_POD_NAMESPACE=", "XK8S_POD_NAMESPACE=shop", ""):
        plugin("ADD", CNI_ARGS=args or None).failed(11)


def test_of_two_namespaces_the_last_counts(plugin):
    plugin.exempt("shop")
    assert plugin("ADD", CNI_ARGS="K8S_POD_NAMESPACE=bank;K8S_POD_NAMESPACE=shop").code == 0
    plugin("ADD", CNI_ARGS="K8S_POD_NAMESPACE=shop;K8S_POD_NAMESPACE=bank").failed(11)


def test_a_pod_that_enrols_itself_is_not_exempt(plugin):
    plugin.exempt("shop")
    for mode, code in (("ambient", 1), ("none", 0)):
        annotations = {POD_ANNOTATIONS: {"istio.io/dataplane-mode": mode}}
        assert plugin("ADD", plugin.config(runtimeConfig=annotations)).code == code


@pytest.mark.parametrize("name", ["../cni", "..", ".", "", "/", "a/../shop", "Shop", "-shop", "s" * 64, "shop\n"])
def test_only_a_label_becomes_a_path(plugin, name):
    plugin.exempt("shop")
    (plugin.socket.parent / "cni").touch()
    if "/" not in name and name.strip("."):
        plugin.exempt(name)
    plugin("ADD", CNI_ARGS=f"K8S_POD_NAMESPACE={name}").failed(11)


def test_a_directory_does_not_exempt(plugin):
    (plugin.socket.parent / "exempt" / "shop").mkdir(parents=True)
    plugin("ADD").failed(11)


@pytest.mark.root
def test_p21_runs_in_an_empty_root(plugin, agent):
    root = plugin.socket.parent
    shutil.copy(plugin.binary, root / "sluice-cni")
    (root / "ns").touch()

    def enter() -> None:
        os.chroot(root)
        os.chdir("/")

    config = plugin.config(socket="/cni.sock")
    done = plugin("ADD", config, enter=enter, binary="/sluice-cni", CNI_NETNS="/ns")
    assert (done.code, done.json) == (0, config["prevResult"])
    status = (root / "ns").stat()
    assert agent.files == [(status.st_dev, status.st_ino)]
