# SPDX-License-Identifier: Apache-2.0
"""Runs a CNI chain as a container runtime does: the lab's stand-in for containerd and its libcni.

ADD calls the plugins in order, each with the result of the previous one; a failure is followed by DEL at once. DEL runs
in reverse with the cached result, and runtimes call it twice: when the pod stops, and when its sandbox is removed, by
then without namespace and result. All plugins run in the node's namespace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from agent.core.errors import SluiceError
from agent.kernel.exec import run
from agent.lab.conflist import IFNAME, Attachment, Json, environment, plugin_input

REPO: Final = Path(__file__).resolve().parents[2]
CNI_PATH: Final = (REPO / "cni_plugin", Path("/usr/lib/cni"))


class ChainError(SluiceError):
    """A plugin failed. `code` is CNI's, or -1 when the plugin did not answer with an error as specified."""

    def __init__(self, plugin: str, verb: str, *, msg: str, code: int = -1, details: str = "") -> None:
        super().__init__(f"{plugin} {verb}: {msg} (CNI error {code}){': ' + details if details else ''}")
        self.plugin = plugin
        self.verb = verb
        self.code = code
        self.msg = msg
        self.details = details


class CniChain:
    """One node's chain: reads the configuration list at `config` for every operation."""

    def __init__(self, config: Path, cache: Path, netns: Path | None, *, path: Sequence[Path] = CNI_PATH) -> None:
        self.config = config
        self.cache = cache
        self.netns = netns
        self.path = path
        self._random = random.Random()

    def add(self, attachment: Attachment) -> Json:
        """Calls ADD and returns the last plugin's result. Raises ChainError after a call of DEL."""
        network = self._network()
        result = None
        try:
            for plugin in network["plugins"]:
                stdin = plugin_input(network, plugin, attachment, result)
                result = self._call("ADD", plugin, stdin, attachment)
        except BaseException:
            with contextlib.suppress(ChainError):  # the error of ADD is the one to report
                self.delete(attachment)
            raise
        if result is None:
            raise ChainError(network["name"], "ADD", msg="the last plugin printed no result")
        self.cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        kept = {"attachment": dataclasses.asdict(attachment), "result": result}
        self._cached(attachment).write_text(json.dumps(kept))
        return result

    def delete(self, attachment: Attachment) -> None:
        """Calls DEL of every plugin, then raises the first ChainError: one failure must not stop the others."""
        network = self._network()
        result = self.result(attachment)
        first = None
        for plugin in reversed(network["plugins"]):
            try:
                self._call("DEL", plugin, plugin_input(network, plugin, attachment, result), attachment)
            except ChainError as error:
                first = first or error
        if first is not None:
            raise first
        self._cached(attachment).unlink(missing_ok=True)

    def result(self, attachment: Attachment) -> Json | None:
        """Returns the cached result of ADD; None before it and after DEL."""
        try:
            kept: Json = json.loads(self._cached(attachment).read_text())
        except FileNotFoundError:
            return None
        result: Json = kept["result"]
        return result

    def _cached(self, attachment: Attachment) -> Path:
        return self.cache / f"{attachment.container_id}-{IFNAME}.json"

    def _network(self) -> Json:
        network: Json = json.loads(self.config.read_text())
        return network

    def _call(self, verb: str, plugin: Json, stdin: Json, attachment: Attachment) -> Json | None:
        program = self._find(plugin["type"], verb)
        variables = environment(verb, self.path, attachment, self._random)
        done = run([str(program)], stdin=json.dumps(stdin), netns=self.netns, env=variables, check=False)
        answer: Any = _parse(done.stdout)
        if done.returncode:
            if not isinstance(answer, dict) or "code" not in answer:
                output = (done.stderr or done.stdout).strip() or f"exit {done.returncode} without output"
                raise ChainError(plugin["type"], verb, msg=output)
            raise ChainError(
                plugin["type"], verb, code=answer["code"], msg=answer.get("msg", ""), details=answer.get("details", "")
            )
        if done.stdout.strip() and not isinstance(answer, dict):
            raise ChainError(plugin["type"], verb, msg="stdout is not a JSON object", details=done.stdout[:200])
        return answer if isinstance(answer, dict) else None

    def _find(self, kind: str, verb: str) -> Path:
        for directory in self.path:
            if (directory / kind).is_file():
                return directory / kind
        raise ChainError(kind, verb, msg=f"no such plugin in {':'.join(map(str, self.path))}")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
