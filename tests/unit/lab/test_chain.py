# SPDX-License-Identifier: Apache-2.0
"""The runtime's part of CNI, against plugins that are a few lines of shell: they log the call, keep stdin."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from agent.lab.chain import ChainError, CniChain
from agent.lab.conflist import Attachment

POD = Attachment(
    container_id="c1", netns="/run/netns/slux-shop-web", namespace="shop", name="web", uid="uid-1", annotations={}
)
RESULT = {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.1/24"}]}


class Bench:
    """A chain of two plugins, `first` and `second`, whose answers a test chooses."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.version("1.0.0")
        for name in ("first", "second"):
            self.plugin(name, f"echo '{json.dumps(RESULT)}'")
        self.chain = CniChain(directory / "conflist", directory / "cache", None, path=[directory])

    def version(self, version: str) -> None:
        plugins = [{"type": "first"}, {"type": "second"}]
        network = {"cniVersion": version, "name": "lab", "plugins": plugins}
        (self.directory / "conflist").write_text(json.dumps(network))

    def plugin(self, name: str, script: str) -> None:
        path = self.directory / name
        log, stdin = self.directory / "log", self.directory / f"{name}.stdin"
        path.write_text(
            f'#!/bin/sh\necho "$CNI_COMMAND {name} $CNI_CONTAINERID $CNI_NETNS" >> {log}\ncat > {stdin}\n{script}\n'
        )
        path.chmod(0o755)

    def calls(self) -> list[str]:
        lines = (self.directory / "log").read_text().splitlines()
        (self.directory / "log").unlink()
        return [" ".join(line.split()[:2]) for line in lines]

    def stdin(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.directory / f"{name}.stdin").read_text())
        return value


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_add_runs_in_order_and_hands_each_result_on(bench: Bench) -> None:
    assert bench.chain.add(POD) == RESULT
    assert bench.calls() == ["ADD first", "ADD second"]
    assert "prevResult" not in bench.stdin("first")
    assert bench.stdin("second")["prevResult"] == RESULT


def test_del_runs_backwards_with_the_cached_result_and_again_without(bench: Bench) -> None:
    bench.chain.add(POD)
    bench.calls()
    bench.chain.delete(POD)
    assert bench.calls() == ["DEL second", "DEL first"]
    assert bench.stdin("first")["prevResult"] == RESULT
    bench.chain.delete(dataclasses.replace(POD, netns=""))
    assert (bench.directory / "log").read_text().splitlines() == ["DEL second c1 ", "DEL first c1 "]
    assert "prevResult" not in bench.stdin("first")


def test_a_failed_add_is_followed_by_del_and_tells_the_plugins_own_words(bench: Bench) -> None:
    error = {"cniVersion": "1.0.0", "code": 11, "msg": "agent not there", "details": "try again"}
    bench.plugin("second", f"echo '{json.dumps(error)}'; exit 1")
    with pytest.raises(ChainError) as caught:
        bench.chain.add(POD)
    assert (caught.value.plugin, caught.value.code, caught.value.verb) == ("second", 11, "ADD")
    assert (caught.value.msg, caught.value.details) == ("agent not there", "try again")
    assert bench.calls() == ["ADD first", "ADD second", "DEL second", "DEL first"]
    assert bench.chain.result(POD) is None


def test_one_plugin_that_fails_in_del_does_not_keep_the_others_from_it(bench: Bench) -> None:
    bench.chain.add(POD)
    bench.calls()
    bench.plugin("second", "exit 3")
    with pytest.raises(ChainError, match="second DEL: exit 3"):
        bench.chain.delete(POD)
    assert bench.calls() == ["DEL second", "DEL first"]
    assert bench.chain.result(POD) == RESULT, "a runtime keeps what it has to try again with"


@pytest.mark.parametrize("script", ["echo oops >&2; exit 1", "echo '[]'; exit 1", "echo nonsense", "true"])
def test_an_answer_against_the_specification_is_an_error(bench: Bench, script: str) -> None:
    bench.plugin("second", script)
    with pytest.raises(ChainError) as caught:
        bench.chain.add(POD)
    assert caught.value.code == -1


def test_a_missing_plugin_is_named(bench: Bench) -> None:
    (bench.directory / "second").unlink()
    with pytest.raises(ChainError, match="no such plugin"):
        bench.chain.add(POD)
