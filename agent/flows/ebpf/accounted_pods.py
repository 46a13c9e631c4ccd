# SPDX-License-Identifier: Apache-2.0
"""The accounted pods: their entries and rules in the maps, and the programs that watch their interfaces."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from agent.backends.ebpf import abi, attachments, object_files
from agent.backends.ebpf.abi import PodFlag, PodValue
from agent.backends.ebpf.backend import drop_policy, put_policy
from agent.backends.ebpf.compiling import entries
from agent.backends.ebpf.pins import Pins
from agent.core.model.redirect import Redirect
from agent.kernel.bpf import bpffs
from agent.kernel.bpf.map import Maps
from agent.kernel.netlink.notifications import BELIEVED
from agent.kernel.pod_netns import PodNetns

_KEPT = PodFlag.CAPTURED | PodFlag.KNOWN


@dataclass(slots=True)
class AccountedPods:
    """Handles one pod at a time per thread. `watching`: packets that bypass all rules are watched, too."""

    pins: Pins
    watching: bool
    sizes: Mapping[str, int] = field(default_factory=dict)
    _maps: Maps = field(init=False)
    # Interfaces, and when they were read.
    _watched: dict[int, tuple[tuple[int, ...], float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._maps = Maps(self.pins.maps)

    def enrol(self, target: PodNetns, want: Redirect, *, captured: bool, known: bool = False) -> bool:
        """Returns whether the pod had an entry already. `known`: all of ztunnel's listeners in it are in map owners.

        Raises KernelError.
        """
        cookie = target.netns.id.cookie
        compiled = entries(want, target.wiring(), cookie)
        old = self._entry(cookie)
        # A pod that is captured or known stays so while its rules are replaced.
        flags = old.flags & _KEPT if old else PodFlag(0)
        flags |= (PodFlag.CAPTURED if captured else flags) | (PodFlag.KNOWN if known else flags)
        compiled = replace(compiled, pod=replace(compiled.pod, flags=compiled.pod.flags | flags))
        if old != compiled.pod:
            put_policy(self._maps, compiled.pod.policy, compiled.prefixes)
            self._maps["pods"].update(abi.cookie(cookie), compiled.pod.encode())
            if old is not None and old.policy not in (0, compiled.pod.policy):
                drop_policy(self._maps, old.policy)
        return old is not None

    def watch(self, target: PodNetns) -> None:
        """Attaches the watch to all interfaces but lo. tcx waits for all CPUs: not while a caller waits for the pod.

        Raises KernelError.
        """
        if not self.watching:
            return
        cookie = target.netns.id.cookie
        indices = tuple(link.index for link in target.wiring().links)
        now = time.monotonic()
        seen, when = self._watched.get(cookie, ((), -BELIEVED))
        if seen == indices and now - when < BELIEVED:
            return  # reading the attachments costs more than the rest of a pass over an unchanged pod
        directory = self.pins.pod(cookie)
        links = {f"watch-{index}": object_files.WATCH for index in indices}
        for step, _ in list(attachments.steps(links, attachments.read(directory, (object_files.WATCH,)))):
            attachments.do(
                step.payload,
                self.pins,
                directory,
                partial(attachments.attach_tcx, target.netns),
                self.sizes,
                struct.pack("=Q", cookie),
            )
        self._watched[cookie] = (indices, now)

    def release(self, cookie: int) -> None:
        """Removes the pod's entries and watches. Raises KernelError."""
        self._watched.pop(cookie, None)
        if not self._maps.exist():
            return
        old = self._entry(cookie)
        self._maps["pods"].delete(abi.cookie(cookie))
        bpffs.remove_tree(self.pins.pod(cookie).path)
        if old is not None and old.policy:
            drop_policy(self._maps, old.policy)

    def doubt(self) -> None:
        """Clears KNOWN in all pods, so that ztunnel's ports and mark are refused to no process. Raises KernelError."""
        for key, value in self._maps["pods"].items():
            pod = PodValue.decode(value)
            self._maps["pods"].update(key, replace(pod, flags=pod.flags & ~PodFlag.KNOWN).encode())

    def cookies(self) -> set[int]:
        """Returns the cookies of the namespaces that have entries or pins. Raises KernelError."""
        if not self._maps.exist():
            return set()
        return {*(abi.uncookie(key) for key, _ in self._maps["pods"].items()), *self.pins.pods()}

    def _entry(self, cookie: int) -> PodValue | None:
        data = self._maps["pods"].lookup(abi.cookie(cookie))
        return None if data is None else PodValue.decode(data)
