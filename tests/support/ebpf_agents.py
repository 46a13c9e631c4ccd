# SPDX-License-Identifier: Apache-2.0
"""Agents one after the other on one node with eBPF: each with handles of its own, some killed in the middle of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ebpf_pod import Stage

from agent.backends.ebpf import object_files
from agent.backends.ebpf.backend import EbpfBackend
from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.programs import NodeTarget, ProgramsBackend
from agent.backends.ebpf.ztunnels import Ztunnels
from agent.backends.routing import RoutingBackend
from agent.core.model.redirect import Redirect
from agent.kernel.bpf import libbpf
from agent.kernel.netns import Netns
from agent.kernel.pod_netns import PodNetns
from agent.kernel.process import Process
from agent.reconciler.converge import Settled, settle, settle_each, settle_layer, verify_each

# What changes anything in the kernel: calls of libbpf, and of a Path on bpffs.
CALLS = ("bpf_object__load", "bpf_obj_pin", "bpf_link_create", "bpf_link_update", "bpf_map_update_elem",
         "bpf_map_delete_elem")  # fmt: skip
PATHS = ("unlink", "rmdir", "rename", "mkdir")


class Agent:
    """A process's view; the ztunnel is the process `ztunnel`, which holds the listeners."""

    def __init__(self, node: Stage, ztunnel: int) -> None:
        self.node, registry = node, Ztunnels()
        registry.arrived(Process(ztunnel, os.pidfd_open(ztunnel)))
        self.target = PodNetns(Netns.open(node.pod.path))
        self.pins = Pins.of(str(node.node.pins.root))
        self.programs, self.pods = ProgramsBackend(self.pins, registry), EbpfBackend(self.pins, registry)
        self.layers = (RoutingBackend(), self.programs, self.pods)
        self.registry = registry

    def enrol(self, want: Redirect) -> None:
        settle(self.target, want, self.layers)

    def remove(self) -> None:
        """As the agent removes one pod."""
        settle(self.target, None, (self.pods,))

    def sweep(self, *known: PodNetns) -> None:
        """What nobody owns, as the agent does it again and again."""
        done = Settled()
        for orphan in self.pods.orphans(known):
            settle_layer(self.pods, orphan, None, done)

    def remove_programs(self) -> None:
        settle_each(NodeTarget(), [(self.programs, None)])  # type: ignore[arg-type]

    def wrong(self, want: Redirect | None) -> dict[str, Any]:
        return verify_each(self.target, [(layer, want) for layer in (self.layers if want else (self.pods,))])

    def close(self) -> None:
        self.target.close()
        for process in self.registry.processes():
            process.close()


@contextlib.contextmanager
def agent(node: Stage, ztunnel: int = 0) -> Iterator[Agent]:
    made = Agent(node, ztunnel or os.getpid())
    try:
        yield made
    finally:
        made.close()


def killed_before(step: int, node: Stage, act: Callable[[Agent], None]) -> bool:
    """Runs `act` with a new agent in a child that is killed before its `step`-th change of the kernel.

    False when it has come to its end before that. AssertionError when it failed.
    """
    ztunnel, child = os.getpid(), os.fork()
    if not child:
        code = 1
        try:
            made = Agent(node, ztunnel)
            _count(step)
            act(made)
            code = 0
        except Exception:  # noqa: BLE001 - told of here, for nothing of pytest's may run in the child
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert status == 0, f"the agent failed: {status}"
    return False


def _count(step: int) -> None:
    """From now on the process ends instead of making that change; the first is 1."""
    left = step
    ask = libbpf.ask

    def passed() -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(name: str, *arguments: Any) -> int:
        if name in CALLS:
            passed()
        return ask(name, *arguments)

    libbpf.ask = counted
    for name in PATHS:
        setattr(Path, name, _counting(getattr(Path, name), passed))


def _counting(change: Any, passed: Callable[[], None]) -> Any:
    def counted(self: Path, *arguments: Any, **named: Any) -> Any:
        passed()
        return change(self, *arguments, **named)

    return counted


def other_build(at: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Objects that do the same and have other digests: what it returns switches between builds, True is the new."""
    shutil.copytree(object_files.DIRECTORY, at)
    for one in at.glob("*.bpf.o"):
        one.write_bytes(one.read_bytes() + b"\0")
    old = object_files.DIRECTORY

    def switch(new: bool) -> None:
        monkeypatch.setattr(object_files, "DIRECTORY", at if new else old)
        object_files.digest.cache_clear()

    return switch
