# SPDX-License-Identifier: Apache-2.0
"""What `sluice-cni` makes of a configuration or an environment that it cannot use."""

from __future__ import annotations

import pytest

from agent.sources.cni.wire import CniReply

VERBS = ("ADD", "CHECK", "STATUS", "GC")

# What the runtime got wrong

BAD_KEYS = {
    "socket": ["cni.sock", "", 5, "/" + "x" * 107, "/a\0b", ["/a"]],
    "timeoutSeconds": [0, 0.5, 121, -1, "5", True, [], 1e300],
    "excludeNamespaces": ["shop", {}, 1],
    "excludeNamespaces[1]": [["a", "B"], ["a", 1], ["a", ""], ["a", "a\0"], ["a", "../x"], ["a", "s" * 64]],
    "exemptPods": ["shop/web", {}, 1],
    "exemptPods[0]": [
        [one] for one in ("shop", "/web", "shop/", "shop/*", "shop/w*b", "shop/Web", "a b/c", 5, "s/w\0")
    ],
    "exemptPods[1]": [["shop/web", "../x/web"], ["shop/web", "shop/web**"], ["shop/web", "shop/" + "w" * 254]],
    "prevResult": [[], "x", 0],
    "runtimeConfig": [[], "x"],
    "capabilities": [[], "x"],
    "name": ["", "a b", 5, "-a"],
    "type": [5, []],
    "cniVersion": [1.0, {}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD_KEYS.items() for value in values])
def test_a_bad_key_is_named(plugin, agent, key, value):
    plugin("ADD", plugin.config(**{key.partition("[")[0]: value})).failed(7, f"{key}: ")
    assert agent.requests == []


@pytest.mark.parametrize("value", [1, 120, 1.5])
def test_good_timeouts(plugin, agent, value):
    assert plugin("ADD", plugin.config(timeoutSeconds=value)).code == 0


@pytest.mark.parametrize("verb", ["ADD", "CHECK"])
def test_prev_result_is_needed(plugin, agent, verb):
    error = plugin(verb, plugin.config(prevResult=None)).failed(7, "prevResult: ")
    assert "chain sluice-cni after a primary plugin" in error["msg"]


def test_name_is_needed(plugin, agent):
    plugin("ADD", plugin.config(name=None)).failed(7, "name: ")


@pytest.mark.parametrize("stdin", [b"", b"{", b"[]", b"5", b'{"a":1}x', b'{"a":"\xff"}', b"[" * 100_000])
@pytest.mark.parametrize("verb", VERBS)
def test_undecodable_configuration(plugin, verb, stdin):
    plugin(verb, stdin).failed(6, "network configuration: ")


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "1.2.0", "", "x", None])
def test_incompatible_version(plugin, agent, version):
    error = plugin("ADD", plugin.config(cniVersion=version)).failed(1, "cniVersion: ")
    assert error["cniVersion"] == "1.1.0"


@pytest.mark.parametrize(
    ("verb", "version"), [("CHECK", "0.3.1"), ("STATUS", "1.0.0"), ("GC", "1.0.0"), ("GC", "0.3.1")]
)
def test_a_verb_younger_than_the_version(plugin, agent, verb, version):
    error = plugin.ask(verb, cniVersion=version).failed(1, verb)
    assert error["cniVersion"] == version
    assert agent.requests == []


BAD_VARIABLES = {
    "CNI_CONTAINERID": [None, "", "-a", "a b", "a/b", "ä", "a" * 257, ".."],
    "CNI_IFNAME": [None, "", ".", "..", "a/b", "a:b", "a b", "e" * 16, "\udcff"],
    "CNI_NETNS": [None, "", "run/netns/x", "/run/netns/\udcff"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_VARIABLES.items() for value in values]
)
@pytest.mark.parametrize("verb", ["ADD", "CHECK"])
def test_a_bad_variable_is_named(plugin, agent, verb, name, value):
    plugin(verb, **{name: value}).failed(4, f"{name}: ")
    assert agent.requests == []


def test_args_that_are_not_text(plugin, agent):
    plugin("ADD", CNI_ARGS="A=\udcff").failed(4, "CNI_ARGS: ")


def test_a_namespace_that_vanished(plugin, agent):
    plugin("ADD", CNI_NETNS="/nonexistent/ns").failed(4, "CNI_NETNS: open /nonexistent/ns: No such file or directory")
    assert agent.requests == []


@pytest.mark.parametrize("verb", [None, "", "add", "UPDATE", "ADD "])
def test_an_unknown_verb(plugin, agent, verb):
    error = plugin("", plugin.config(cniVersion="1.0.0"), CNI_COMMAND=verb).failed(4, "CNI_COMMAND: ")
    assert error["cniVersion"] == "1.0.0"


# DEL never fails

NASTY: dict[str, tuple[dict[str, object] | bytes, dict[str, str | None]]] = {
    "no input": (b"", {}),
    "not JSON": (b"{{", {}),
    "not an object": (b"[1]", {}),
    "too large": (b" " * (1024 * 1024 + 1), {}),
    "unknown version": ({"cniVersion": "9.0.0"}, {}),
    "bad socket": ({"socket": "relative"}, {}),
    "bad timeout": ({"timeoutSeconds": "soon"}, {}),
    "bad exclusions": ({"excludeNamespaces": [1]}, {}),
    "no name": ({"name": None}, {}),
    "prevResult is a list": ({"prevResult": []}, {}),
    "no container": ({}, {"CNI_CONTAINERID": None}),
    "bad container": ({}, {"CNI_CONTAINERID": "../x"}),
    "no interface": ({}, {"CNI_IFNAME": None}),
    "relative namespace": ({}, {"CNI_NETNS": "ns"}),
    "vanished namespace": ({}, {"CNI_NETNS": "/nonexistent/ns"}),
    "args are not text": ({}, {"CNI_ARGS": "A=\udcff"}),
    "no environment": ({}, dict.fromkeys(("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"))),
}


@pytest.mark.parametrize(("given", "variables"), NASTY.values(), ids=NASTY)
@pytest.mark.parametrize("alive", [False, True], ids=["agent down", "agent refuses"])
def test_del_never_fails(plugin, request, given, variables, alive):
    if alive:
        request.getfixturevalue("agent").answer = CniReply(999, "no")
    stdin = given if isinstance(given, bytes) else plugin.config(**given)
    done = plugin("DEL", stdin, **variables)
    assert (done.code, done.stdout) == (0, b"")


UNTOLD = ("no input", "not JSON", "not an object", "too large", "bad socket", "no container", "bad container")


@pytest.mark.parametrize("situation", sorted({*NASTY} - {*UNTOLD, "no environment"}))
def test_del_is_told_to_the_agent_even_so(plugin, agent, situation):
    given, variables = NASTY[situation]
    plugin("DEL", plugin.config(**given), **variables)
    assert [request.container_id for request in agent.requests] == ["c0ffee"]


def test_the_second_del_has_no_namespace_and_no_prev_result(plugin, agent):
    done = plugin("DEL", plugin.config(prevResult=None), CNI_NETNS="")
    assert (done.code, done.stdout) == (0, b"")
    assert (agent.requests[0].netns, agent.requests[0].addresses, agent.files) == ("", (), [None])
