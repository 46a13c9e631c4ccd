# SPDX-License-Identifier: Apache-2.0
"""What is taken for a configuration, and what is made of it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import SettingsError
from agent.core.settings import Settings
from agent.install import conflists
from agent.install.conflists import Conf, chainable, kept_name, own_name, parse, plugin_entry, readable, strip, wrap

GOOD = {"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}
ENTRY = plugin_entry(Settings())


def conf(name: str = "10-net.conflist", **changes: object) -> Conf:
    value = {key: one for key, one in {**GOOD, **changes}.items() if one is not None}
    return parse(name, json.dumps(value).encode())


HOSTILE = {
    "empty": (b"", "empty"),
    "blank": (b" \n\0", "empty"),
    "half": (json.dumps(GOOD).encode()[:-10], "not JSON"),
    "BOM": (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "not JSON"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "not JSON"),
    "not UTF-8": (b'{"name": "\xff"}', "not JSON"),
    "twice": (b'{"name": "a", "name": "b", "plugins": [{"type": "x"}]}', "'name' occurs twice"),
    "twice inside": (b'{"name": "a", "plugins": [{"type": "x", "type": "y"}]}', "'type' occurs twice"),
    "huge": (b'{"name": "' + b"x" * (1 << 20) + b'"}', "larger than"),
    "deep": (b"[" * 100_000, "not JSON"),
    "deep object": (b'{"a":' * 200 + b"1" + b"}" * 200, "nested deeper"),
    "trailing": (json.dumps(GOOD).encode() + b"x", "not JSON"),
    "NaN": (b'{"name": "a", "x": NaN, "plugins": [{"type": "x"}]}', "NaN"),
    "infinite": (b'{"name": "a", "x": 1e999, "plugins": [{"type": "x"}]}', "too large"),
    "digits": (b'{"name": "a", "x": ' + b"9" * 5000 + b', "plugins": [{"type": "x"}]}', "not JSON"),
    "a list": (b"[]", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "no plugins": (b'{"name": "a", "plugins": []}', "no plugins"),
    "plugins null": (b'{"name": "a", "plugins": null}', "no plugins"),
    "plugins text": (b'{"name": "a", "plugins": "x"}', "no plugins"),
    "no type": (b'{"name": "a", "plugins": [{"type": "x"}, {}]}', "plugins[1] has no type"),
    "type is a path": (b'{"name": "a", "plugins": [{"type": "../x"}]}', "not the name of a file"),
    "type is null": (b'{"name": "a", "plugins": [{"type": null}]}', "has no type"),
    "plugin is text": (b'{"name": "a", "plugins": ["x"]}', "plugins[0] has no type"),
    "no name": (b'{"plugins": [{"type": "x"}]}', "no name"),
    "version 1": (b'{"name": "a", "cniVersion": 1, "plugins": [{"type": "x"}]}', "cniVersion"),
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_p25_what_a_runtime_would_refuse_is_refused_by_name(case: str) -> None:
    data, words = HOSTILE[case]
    with pytest.raises(SettingsError) as refused:
        parse("10-net.conflist", data)
    assert str(refused.value).startswith("10-net.conflist: ")
    assert words in str(refused.value)


def test_a_list_in_a_conf_is_refused_as_by_containerd() -> None:
    with pytest.raises(SettingsError, match="the plugin has no type"):
        parse("10-net.conf", json.dumps(GOOD).encode())


def test_a_name_that_no_configuration_could_hold() -> None:
    with pytest.raises(SettingsError, match="the file name"):
        parse("10-\udcff.conflist", json.dumps(GOOD).encode())


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """A configuration or SettingsError, nothing else."""
    for name in ("a.conf", "a.conflist"):
        try:
            found = parse(name, data)
        except SettingsError:
            continue
        wrap(found, ENTRY, "02-sluice.conflist")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
TYPES = st.sampled_from(["bridge", "portmap", "sluice-cni", "multus"])
PLUGIN = st.dictionaries(st.text(max_size=8), JSON, max_size=3).flatmap(
    lambda rest: TYPES.map(lambda kind: {**rest, "type": kind})
)


@given(st.lists(PLUGIN, min_size=1, max_size=4), st.dictionaries(st.text(max_size=6), JSON, max_size=3))
def test_p27_nothing_is_lost_in_any_list(plugins: list[dict[str, object]], extra: dict[str, object]) -> None:
    """All but entries of ours comes through, in order; wrapping what was wrapped changes nothing more."""
    given_list = {**extra, "cniVersion": "1.0.0", "name": "net", "plugins": plugins}
    primary = parse("10-net.conflist", json.dumps(given_list).encode())
    made = parse("02-sluice.conflist", wrap(primary, ENTRY, "02-sluice.conflist"))
    assert json.dumps(json.loads(strip(made))) == json.dumps(conflists.stripped(given_list))
    assert [plugin["type"] for plugin in made.plugins].count("sluice-cni") == 1
    assert made.plugins[-1]["type"] == "sluice-cni"
    assert conflists.is_own(made)
    again = wrap(Conf(primary.name, b"", made.network, single=False), ENTRY, "02-sluice.conflist")
    assert again == made.data


@pytest.mark.parametrize(
    ("version", "words"),
    [("0.3.0", ""), ("1.1.0", ""), ("0.2.0", "no plugin chains"), (None, "0.1.0 has no"), ("1.2.0", "not supported")],
)
def test_versions_are_kept_or_refused_never_raised(version: str | None, words: str) -> None:
    found = conf(cniVersion=version)
    assert words in chainable(found)
    assert bool(words) == bool(chainable(found))
    assert json.loads(wrap(found, ENTRY, "x")).get("cniVersion") == version


def test_of_many_versions_those_stay_that_our_plugin_knows() -> None:
    made = json.loads(wrap(conf(cniVersions=["0.4.0", "1.1.0", "9.0.0"]), ENTRY, "x"))
    assert made["cniVersions"] == ["0.4.0", "1.1.0"]


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("10-calico.conflist", "02-sluice.conflist"),
        ("00-multus.conf", "00-multus-sluice.conflist"),
        ("01-kube-ovn.conflist", "01-kube-ovn-sluice.conflist"),
        ("02-istio-cni.conflist", "02-istio-cni-sluice.conflist"),
        ("02-sluice.conf", "02-sluice-sluice.conflist"),
        (".conf", "-sluice.conflist"),
    ],
)
def test_our_name_sorts_first(first: str, expected: str) -> None:
    assert own_name("02-sluice.conflist", first) == expected
    assert sorted([first, expected])[0] == expected


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=12))
def test_our_name_sorts_first_whatever_the_others(stem: str) -> None:
    for end in conflists.EXTENSIONS:
        name = stem.replace("/", "") + end
        assert own_name("02-sluice.conflist", name) < name
        assert own_name("02-sluice.conflist", name).endswith(".conflist")
        assert readable([kept_name(name)]) == []


def test_readable_are_those_of_the_runtime_in_its_order() -> None:
    names = ["b.conf", "a.conflist", ".x.conf", "c.json", "d.conflist.bak", "e.conf.kept", "f"]
    assert readable(names) == [".x.conf", "a.conflist", "b.conf", "c.json"]
