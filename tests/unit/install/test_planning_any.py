# SPDX-License-Identifier: Apache-2.0
"""Any directory, however it came about: installing settles, uninstalling leaves nothing of ours, no step breaks it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.installing import apply

from agent.core.errors import SettingsError
from agent.core.settings import Settings
from agent.install import conflists, planning
from agent.install.conflists import plugin_entry
from agent.install.planning import InstallPlan, View

WISHED = "02-sluice.conflist"
ENTRY = plugin_entry(Settings())
MODES: dict[str, Callable[..., InstallPlan]] = {"own": planning.own, "insert": planning.insert}
NAMES = [
    "00-multus.conf", "02-istio-cni.conflist", "10-a.conf", "10-a.conflist", "10-a.json", "20-b.conflist", WISHED,
    "00-multus-sluice.conflist", "02-sluice.conflist.cilium_bak",
]  # fmt: skip
FILES = [*NAMES, *(conflists.kept_name(name) for name in NAMES[:6]), ".sluice-new-1"]
OURS = st.builds(
    lambda keys: {**ENTRY, **keys},
    st.dictionaries(st.sampled_from(["file", "wraps", "from"]), st.sampled_from(NAMES), max_size=3),
)
PLUGIN = st.sampled_from([{"type": "a"}, {"type": "b", "x": 1}, {"type": "istio-cni"}]) | OURS
DELEGATING = st.lists(PLUGIN, min_size=1, max_size=2).map(lambda ones: {"type": "multus", "delegates": ones})
LIST = st.builds(
    lambda version, plugins: {"cniVersion": version, "name": "n", "plugins": plugins},
    st.sampled_from(["0.3.1", "1.0.0"]),
    st.lists(PLUGIN | DELEGATING, min_size=1, max_size=3),
)
SINGLE = (PLUGIN | DELEGATING).map(lambda plugin: {"cniVersion": "0.4.0", "name": "n", **plugin})
CONTENT = (LIST | SINGLE).map(lambda value: json.dumps(value).encode()) | st.sampled_from([b"", b"{", b"[]"])
DIRECTORY = st.dictionaries(st.sampled_from(FILES), CONTENT, max_size=6)


def valid(files: dict[str, bytes]) -> list[conflists.Conf]:
    found = []
    for name in conflists.readable(files):
        try:
            conf = conflists.parse(name, files[name])
        except SettingsError:
            continue
        if conflists.stripped(conf.plugins):  # nothing but our plugin is nobody's list: no pod could start with it
            found.append(conf)
    return found


def carry_out(files: dict[str, bytes], verdict: InstallPlan) -> None:
    could = bool(valid(files))
    for action in verdict.actions:
        apply(files, action)
        assert valid(files) or not could  # never takes the last list away, not even between two steps


def plugins(*types: str) -> bytes:
    return json.dumps({"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": each} for each in types]}).encode()


@given(DIRECTORY, st.sampled_from(sorted(MODES)))
@example({"02-istio-cni.conflist": plugins("istio-cni"), "10-a.conflist": plugins("a")}, "insert")
@example({"02-istio-cni.conflist": plugins("a", "istio-cni"), "10-a.conflist": plugins("a")}, "insert")
@example({"02-istio-cni.conflist": plugins("a", "istio-cni"), "10-a.conflist": plugins("a")}, "own")
def test_installing_settles_and_ours_is_first(files: dict[str, bytes], mode: str) -> None:
    for _ in range(4):
        verdict = MODES[mode](View(files), ENTRY, WISHED)
        if not verdict.actions:
            break
        carry_out(files, verdict)
    assert verdict.actions == ()
    if verdict.error:
        return
    # istio-cni keeps these in front.
    theirs = conflists.istio_owned([conf for conf in valid(files) if not conflists.is_own(conf)])
    first = next(conf for conf in valid(files) if conf not in theirs)
    assert first.name == verdict.file
    assert first.plugins[-1]["type"] == "sluice-cni"
    assert sum(conflists.mentions(plugin) for plugin in first.plugins) == 1


@given(DIRECTORY)
def test_p19_after_uninstalling_nothing_names_us(files: dict[str, bytes]) -> None:
    carry_out(files, planning.removal(View(files), WISHED))
    assert not [conf.name for conf in valid(files) if conflists.mentions(conf.network)]
    assert not [name for name in files if name.startswith(conflists.ORIGINAL) or "cilium_bak" in name]
    again = planning.removal(View(files), WISHED)
    assert again.actions == ()


@pytest.mark.parametrize("mode", sorted(MODES))
@given(DIRECTORY)
def test_installing_and_uninstalling(mode: str, files: dict[str, bytes]) -> None:
    theirs = [conf for conf in valid(files) if conf.name != WISHED]  # that name is ours, whoever used it
    before: Any = [conf.network for conf in theirs if not conflists.mentions(conf.network)]
    for _ in range(4):
        carry_out(files, MODES[mode](View(files), ENTRY, WISHED))
    carry_out(files, planning.removal(View(files), WISHED))
    after = [json.dumps(conf.network) for conf in valid(files)]
    assert all(json.dumps(network) in after for network in before)  # whatever was not ours is there, as it was
