# SPDX-License-Identifier: Apache-2.0
"""What the installer makes of the lists that CNI projects install: each in net.d, the result in own and insert.

SLUICE_GOLDEN=write writes the results anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.installing import apply

from agent.core.settings import Settings
from agent.install import planning
from agent.install.conflists import EXTENSIONS, parse, plugin_entry, readable
from agent.install.planning import Action, InstallPlan, View, Write

HERE = Path(__file__).parent
CASES = sorted(path.parent.name for path in HERE.glob("*/net.d"))
WISHED = "02-sluice.conflist"
ENTRY = plugin_entry(Settings(own_namespace="sluice-system"))
MODES: dict[str, Callable[..., InstallPlan]] = {"own": planning.own, "insert": planning.insert}


def originals(case: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (HERE / case / "net.d").iterdir()}


def carry_out(files: dict[str, bytes], actions: tuple[Action, ...]) -> None:
    for action in actions:
        apply(files, action)
        first = parse(runtime_reads(files)[0], files[runtime_reads(files)[0]])  # after each step it is a valid list
        assert first.plugins


def runtime_reads(files: dict[str, bytes]) -> list[str]:
    return readable(files)


def install(mode: str, files: dict[str, bytes]) -> InstallPlan:
    verdict = MODES[mode](View(files), ENTRY, WISHED)
    carry_out(files, verdict.actions)
    return verdict


def test_there_are_enough() -> None:
    assert len(CASES) >= 20


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", list(MODES))
def test_p27_install(mode: str, case: str) -> None:
    """What the runtime then reads first is the primary's list with our entry at its end, and nothing lost."""
    files = originals(case)
    verdict = install(mode, files)
    assert not verdict.error
    assert verdict.file == runtime_reads(files)[0]
    expected = HERE / case / mode / verdict.file
    if os.environ.get("SLUICE_GOLDEN") == "write":
        expected.parent.mkdir(exist_ok=True)
        for old in expected.parent.iterdir():
            old.unlink()
        expected.write_bytes(files[verdict.file])
    assert files[verdict.file] == expected.read_bytes()
    assert [path.name for path in expected.parent.iterdir()] == [verdict.file]
    same_but_for_ours(json.loads(files[verdict.file]), json.loads(originals(case)[sorted(originals(case))[0]]))


def same_but_for_ours(made: dict[str, Any], primary: dict[str, Any]) -> None:
    plugins = made["plugins"]
    assert plugins[-1]["type"] == "sluice-cni"
    if "plugins" in primary:
        assert plugins[:-1] == primary["plugins"]
        assert {**made, "plugins": 0} == {**primary, "plugins": 0}
        assert list(made) == list(primary)
        for ours, theirs in zip(plugins, primary["plugins"], strict=False):
            assert json.dumps(ours) == json.dumps(theirs)  # the order of keys too
    else:
        assert plugins[:-1] == [primary]
        assert (made["name"], made["cniVersion"]) == (primary["name"], primary["cniVersion"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", list(MODES))
def test_p27_install_again_and_uninstall(mode: str, case: str) -> None:
    """A second time nothing is to be done; afterwards all bytes are as they were and no file is left."""
    files = originals(case)
    install(mode, files)
    again = MODES[mode](View(files), ENTRY, WISHED)
    assert again.right
    changed = {**ENTRY, "timeoutSeconds": 5}
    newer = MODES[mode](View(files), changed, WISHED)
    assert [type(action) for action in newer.actions] == [Write]  # an upgrade changes our entry alone
    carry_out(files, newer.actions)
    carry_out(files, planning.removal(View(files), WISHED).actions)
    assert files == originals(case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", list(MODES))
def test_p19_uninstall_is_interrupted_after_each_step(mode: str, case: str) -> None:
    """Whatever comes first for the runtime is a list that works; the rest is done by the next attempt."""
    installed = originals(case)
    install(mode, installed)
    for done in range(len(planning.removal(View(installed), WISHED).actions) + 1):
        files = dict(installed)
        carry_out(files, planning.removal(View(files), WISHED).actions[:done])
        carry_out(files, planning.removal(View(files), WISHED).actions)
        assert files == originals(case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("before", "after"), [("own", "insert"), ("insert", "own")])
def test_the_mode_is_changed(before: str, after: str, case: str) -> None:
    files = originals(case)
    install(before, files)
    for _ in range(2):
        install(after, files)
    assert MODES[after](View(files), ENTRY, WISHED).right
    carry_out(files, planning.removal(View(files), WISHED).actions)
    assert files == originals(case)


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_ours_besides_the_list_is_read_by_a_runtime(case: str) -> None:
    files = originals(case)
    install("insert", files)
    assert all(not name.endswith(EXTENSIONS) for name in files if name.startswith("."))
