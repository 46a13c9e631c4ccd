# SPDX-License-Identifier: Apache-2.0
"""One mechanism's pods, put into one variant after the other: live, as the agent would change them."""

from __future__ import annotations

import contextlib
import select
import socket
from dataclasses import replace

from support import istio
from support.ebpf import EbpfNode
from support.rules import Pod, layers
from support.traffic.arrival import awaited
from support.traffic.variants import FRESH, VARIANTS
from support.traffic.world import ADDRESSES, APP, LOCAL_SERVICE, WAIT, World, opened, world

from agent.core.model.redirect import Redirect
from agent.kernel.exec import run
from agent.reconciler.converge import settle

Old = tuple[socket.socket, socket.socket]  # the client's end, the server's end


class Stage:
    """`families` are those of the pods; with IPv6 alone the rules are for IPv6 alone too."""

    def __init__(self, mechanism: str, families: tuple[int, ...] = (4, 6)) -> None:
        self.mechanism, self.families = mechanism, families
        self.variant = ""
        self.old: dict[tuple[str, int], Old] = {}  # by who began it, and family
        self._made = contextlib.ExitStack()
        self.node = EbpfNode() if mechanism == "ebpf" else None
        if self.node:
            self._made.callback(self.node.close)
            self._layers = self.node.layers
        else:
            self._layers = () if mechanism in istio.ISTIO else layers(mechanism)
        self._programmed: set[Pod] = set()  # with istio-cni's rules
        self._fresh = contextlib.ExitStack()
        self._shared = self._made.enter_context(world(families))
        self.world = self._shared
        try:
            run(["nft", "-f", "-"], netns=self._shared.pod.path, stdin=LOCAL_SERVICE)
        except BaseException:
            self.close()
            raise

    def set(self, variant: str) -> World:
        """The world with the pod in that variant."""
        if variant == self.variant:
            return self.world
        self._fresh.close()
        self.variant, self.world = variant, self._shared
        if variant in FRESH:
            self.world = self._fresh.enter_context(world(self.families))
            self._connect()
        self._capture(replace(VARIANTS[variant], ipv4=False) if self.families == (6,) else VARIANTS[variant])
        return self.world

    def _capture(self, want: Redirect) -> None:
        if self._layers:
            marks = not self.node or self.world.pod.target.wiring().forwards
            settle(self.world.pod.target, replace(want, marks=marks), self._layers)
            return
        if self.world.pod in self._programmed:
            istio.remove(self.world.pod, self.mechanism)
        istio.apply(self.world.pod, self.mechanism, want)
        self._programmed.add(self.world.pod)

    def _connect(self) -> None:
        """Connections in both directions, before there are any rules."""
        for sender, receiver in (("pod", "peer"), ("peer", "pod")):
            for family in self.families:
                kind = socket.AF_INET if family == 4 else socket.AF_INET6
                near = self._fresh.enter_context(opened(self.world.place(sender), lambda k=kind: socket.socket(k)))
                near.settimeout(WAIT)
                near.connect((ADDRESSES[receiver][family], APP))
                arrival = awaited(self.world, family)
                assert arrival.connection and arrival.where == f"{receiver}:{APP}"
                self.old[sender, family] = near, self._fresh.enter_context(arrival.connection)

    def close(self) -> None:
        self._fresh.close()
        self._made.close()


def carries(left: socket.socket, right: socket.socket) -> bool:
    """Both directions; a connection that does not is reset."""
    for sender, receiver in ((left, right), (right, left)):
        try:
            sender.sendall(b"hello")
            ready, _, _ = select.select([left, right], [], [], WAIT)
            if ready != [receiver] or receiver.recv(5, socket.MSG_WAITALL) != b"hello":
                return False
        except ConnectionError:
            return False
    return True
