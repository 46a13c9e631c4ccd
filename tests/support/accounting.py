# SPDX-License-Identifier: Apache-2.0
"""A captured pod whose connections are accounted for by eBPF, and applications that count for themselves.

This process is ztunnel. Applications are forked children: what this process opened would count as ztunnel's own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from support.applications import Child, listener
from support.ebpf import EbpfNode
from support.ebpf_pod import (
    APP,
    CAPTURE,
    IP_TRANSPARENT,
    IPV6_TRANSPARENT,
    PEER,
    SECONDS,
    Namespace,
    Where,
    Ztunnel,
    family,
    pair,
    written,
)
from support.node import until
from support.rules import layers

from agent.backends.ebpf.pins import Pins
from agent.core.model.redirect import Redirect
from agent.core.names import ZTUNNEL_MARK
from agent.flows.ebpf.account_programs import Programs
from agent.flows.ebpf.collector import EbpfCollector
from agent.flows.record import Connection, Delta, Quality
from agent.kernel.bpf import bpffs
from agent.kernel.bpf.map import Maps
from agent.reconciler.converge import settle

MODES = ("nftables", "iptables", "ebpf")


class Account:
    """Node, pod, peer, ztunnel and collector; `told`, `deltas` and `qualities` are all until now."""

    def __init__(
        self,
        made: contextlib.ExitStack,
        mode: str,
        want: Redirect,
        *,
        captured: bool = True,
        ztunnel: bool = True,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.mode, self.want, self.made, self.sizes = mode, want, made, sizes or {}
        self.node = EbpfNode()
        made.callback(self.node.close)
        self.layers = self.node.layers if mode == "ebpf" else layers(mode)
        self.pins = Pins.of(str(self.node.directory / "accounting"))
        made.callback(lambda: bpffs.remove_tree(self.pins.root))
        self.pod, self.peer = pair(made, "slu-ac")
        self.collector = self.another()
        self.collector.admit()
        if ztunnel:
            self.ztunnel = Ztunnel(self.pod)
            made.callback(self.ztunnel.close)
        self.told: list[Connection] = []
        self.deltas: list[Delta] = []
        self.qualities: list[Quality] = []
        self._turn = threading.Lock()
        self.maps = Maps(self.pins.maps)
        self.refresh()  # what is added from here on counts
        if captured:
            self.capture()

    def another(self, pins: Pins | None = None) -> EbpfCollector:
        """A collector, as that of an agent that has just started."""
        shared = self.node.pins.maps / "memories" if self.mode == "ebpf" else None
        programs = Programs(pins or self.pins, shared, self.sizes)
        made = EbpfCollector(programs, self.node.ztunnels, by_socket=self.mode == "ebpf")
        made.start()
        self.made.callback(made.close)
        return made

    def capture(self, want: Redirect | None = None, collector: EbpfCollector | None = None) -> None:
        """As the reconciler does: known first, then captured, then watched."""
        self.want, by = want or self.want, collector or self.collector
        by.enrol(self.pod.target, self.want, captured=False)
        self.settle(self.want)
        self.known(by)

    def known(self, by: EbpfCollector | None = None) -> None:
        """The collector is told that the rules are in force, and watches."""
        by = by or self.collector
        while by.enrol(self.pod.target, self.want, captured=True):
            pass
        by.watch(self.pod.target)

    def settle(self, want: Redirect | None) -> None:
        settle(self.pod.target, want, self.layers)

    def application(self, function: Callable[[], Any], *, where: Namespace | None = None, keep: Any = ()) -> Child:
        child = Child((where or self.pod).path, function, tuple(keep))
        self.made.callback(child.close)
        return child

    def serving(
        self,
        function: Callable[[socket.socket], Any],
        *,
        port: int = APP,
        where: Namespace | None = None,
        keep: Any = (),
    ) -> Child:
        """An application that listens: `function` gets the listener, which is there when this returns."""
        ready, tell = os.pipe()

        def serve() -> Any:
            with listener(port) as listening:
                os.write(tell, b"x")
                os.close(tell)
                return function(listening)

        child = self.application(serve, where=where, keep=(tell, *keep))
        os.close(tell)
        assert os.read(ready, 1), child.result()
        os.close(ready)
        return child

    def relay(self, kind: str, where: Where) -> socket.socket:
        """ztunnel's connection to the application, in the name of a client at the peer."""
        made = self.pod.make(kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, ZTUNNEL_MARK)
        level, option = (socket.SOL_IP, IP_TRANSPARENT) if kind == "IPv4" else (41, IPV6_TRANSPARENT)
        made.setsockopt(level, option, 1)
        made.bind((written(kind, PEER[family(kind)]), 0))
        made.connect((written(kind, where[0]), where[1]))
        return made

    # --- what the collector tells

    def read(self) -> list[Connection]:
        with self._turn:
            self.told += map(self.collector.connection, self.collector.records())
            return self.told

    def refresh(self) -> list[Delta]:
        """All deltas until now."""
        deltas, qualities = self.collector.refresh()
        with self._turn:
            self.deltas += deltas
            self.qualities += qualities
            return self.deltas

    def records(self, count: int, seconds: float = SECONDS) -> list[Connection]:
        """Exactly so many."""
        until(lambda: len(self.read()) >= count, f"{count} records", seconds=seconds)
        assert len(self.told) == count, self.told[-10:]
        return self.told

    def record(self, socket_: int) -> Connection:
        """That of the socket with this cookie, which has ended or is just about to."""
        found = lambda: [one for one in self.read() if one.socket == socket_]  # noqa: E731
        until(found, f"a record of socket {socket_}")
        (one,) = found()
        return one

    def sums(self, **wanted: Any) -> Counter[str]:
        """Of the deltas until now that are so."""
        found = Counter[str]()
        for one in self.refresh():
            if all(getattr(one, key) == value for key, value in wanted.items()):
                for name in ("opened", "closed", "failed", "sent", "received"):
                    found[name] += getattr(one, name)
        return found

    def losses(self) -> int:
        return sum(self.collector.losses().values())

    @contextlib.contextmanager
    def refreshing(self) -> Iterator[Counter[str]]:
        """refresh() all the time meanwhile; how often."""
        done, counted, failed = threading.Event(), Counter[str](), list[BaseException]()

        def run() -> None:
            try:
                while not done.is_set():
                    self.refresh()
                    counted["refreshed"] += 1
            except BaseException as error:  # noqa: BLE001
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield counted
        finally:
            done.set()
            thread.join()
        assert not failed, failed


@contextlib.contextmanager
def accounted(mode: str, want: Redirect = CAPTURE, **options: Any) -> Iterator[Account]:
    with contextlib.ExitStack() as made:
        yield Account(made, mode, want, **options)
