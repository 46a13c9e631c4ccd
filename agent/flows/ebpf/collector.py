# SPDX-License-Identifier: Apache-2.0
"""The collector with eBPF: totals are made in the kernel, and read; ended connections come by a ring buffer."""

from __future__ import annotations

import asyncio
import select
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from agent.backends.ebpf import object_files
from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.ztunnels import Ztunnels
from agent.core.errors import KernelError, StaleError
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import Endpoint
from agent.core.wire.netlink import pack_u32, pack_u64, unpack_int
from agent.flows.collector import Sort
from agent.flows.ebpf import account_abi
from agent.flows.ebpf.account_programs import Programs
from agent.flows.ebpf.accounted_pods import AccountedPods
from agent.flows.ebpf.kernel_totals import KernelTotals
from agent.flows.ebpf.late_accepts import Late
from agent.flows.inet_diag.collector import DiagCollector
from agent.flows.record import Connection, Delta, Quality
from agent.flows.shares import Shares
from agent.kernel.bpf import iterator, syscall
from agent.kernel.bpf.map import Maps
from agent.kernel.bpf.ring_buffer import RingBuffer
from agent.kernel.files import Descriptor
from agent.kernel.pod_netns import PodNetns

_COOKIE = struct.Struct("=Q")
_LATELY = 60 * 10**9  # nanoseconds
_ZTUNNEL = pack_u32(1)  # OWNER_ZTUNNEL


class EbpfCollector:
    """The programs are made by `start`, which raises KernelError where they cannot run."""

    name = "ebpf"

    def __init__(
        self,
        programs: Programs,
        ztunnels: Ztunnels,
        *,
        by_socket: bool,
        watching: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes `by_socket`: backend ebpf captures; its own guard drops traffic that would bypass ztunnel.

        `watching`: otherwise packets that bypass all rules are watched at the pods' interfaces, which needs tcx.
        """
        self.programs = programs
        self._ztunnels = ztunnels
        self._clock = clock
        pins: Pins = programs.pins
        self._pods = AccountedPods(pins, watching and not by_socket, programs.sizes)
        self._maps = Maps(pins.maps)
        self._owned: dict[int, int] = {}  # pod -> version of ztunnels with known listeners
        self._certain = True  # the programs can distinguish ztunnel from other processes
        self._tallies = KernelTotals(self._maps, clock)
        self._shares = Shares(self._maps, clock)
        self._qualities: dict[bytes, bytes] = {}
        # Follows connections that are older than the programs.
        self._preexisting = DiagCollector(ztunnels.held, ztunnels.foreign)
        self._known: set[int] = set()
        self._followed: set[int] = set()  # pods searched for pre-existing connections
        self._gone: set[int] = set()  # pods that may have left connections
        self._late = Late(self._maps, self._tallies, _epoch)
        self._ring: RingBuffer | None = None
        self._woken = select.epoll()  # edge-triggered: there is nearly always something to read
        self._refreshing = threading.Lock()
        self._taking = threading.Lock()
        self._listing = threading.Lock()

    def start(self) -> tuple[str, ...]:
        """Loads and attaches missing programs; returns the drift. Called repeatedly: programs can be detached."""
        wrong = self.programs.settle()
        self._shares.allow()
        if self._ring is None:
            self._ring = RingBuffer.open(self.programs.pins.maps / "records")
            self._woken.register(self._ring, select.EPOLLIN | select.EPOLLET)
            # An earlier agent has exported the present values; the growth since then is never exported.
            self._qualities = dict(self._maps["qualities"].items())
            self._gone = {account_abi.pod_of(key) for key in self._qualities} - self._pods.cookies()
            self.admit()
        return wrong

    def enrol(self, target: PodNetns, want: Redirect, *, captured: bool, fresh: bool = False) -> bool:
        cookie = target.netns.id.cookie
        self._gone.discard(cookie)
        known = self._pods.enrol(target, want, captured=captured, known=self._own(target) or (fresh and self._certain))
        if not known or cookie in self._known:  # pods that an earlier agent has counted can be searched later
            self._follow_preexisting(target, want, captured=captured, fresh=fresh)
        if not captured:
            return True
        if cookie not in self._known:
            self._known.add(cookie)
            return True
        return False

    def watch(self, target: PodNetns) -> None:
        self._pods.watch(target)

    def _follow_preexisting(self, target: PodNetns, want: Redirect, *, captured: bool, fresh: bool) -> None:
        cookie = target.netns.id.cookie
        if cookie in self._followed:
            self._preexisting.change(target, want, captured=captured)
        else:
            self._followed.add(cookie)
            if not fresh:
                self._preexisting.enrol(target, want, captured=captured, besides=lambda: self._counted(cookie))

    def release(self, cookie: int) -> None:
        self._known.discard(cookie)
        self._followed.discard(cookie)
        self._preexisting.release(cookie)
        self._owned.pop(cookie, None)
        self._gone.add(cookie)
        self._pods.release(cookie)

    def sweep(self, dead: Callable[[Collection[int]], Collection[int]]) -> None:
        for cookie in dead(self._pods.cookies()):
            self.release(cookie)
        self._shares.sweep(self._pods.cookies())

    def crowded(self) -> Sequence[tuple[int, str]]:
        with self._refreshing:
            return list(self._shares.crowded())

    def returned(self, cookie: int) -> Endpoint | None:
        since = max(0, time.monotonic_ns() - _LATELY)
        for key, value in self._maps["returns"].items():
            if account_abi.owner(key) == cookie and account_abi.refused(value) > since:
                return account_abi.destination(key)
        return None

    def refresh(self) -> tuple[list[Delta], list[Quality]]:
        with self._refreshing:
            with self._iterator(object_files.REFRESH) as link:
                iterator.read(link)
            deltas, qualities = self._preexisting.refresh()
            return [*deltas, *self._late.deltas(), *self._tallies.added()], [*qualities, *self._new_qualities()]

    def totals(self) -> Mapping[Sort, int]:
        with self._refreshing:
            return Counter(self._tallies.totals()) + Counter(self._preexisting.totals())

    def live(self, pod: int | None = None) -> list[Connection]:
        return [*self._preexisting.live(pod), *self._listed(pod)]

    def _listed(self, pod: int | None) -> list[Connection]:
        with self._listing, self._iterator(object_files.LIST) as link:
            self._maps["chosen"].update(bytes(4), pack_u64(pod or 0))
            data = iterator.read(link)
        # Between two buffers the kernel may go over a socket again (bpfiter.read).
        return list({one.socket: one for one in account_abi.connections(data, _epoch())}.values())

    def _counted(self, pod: int) -> set[int]:
        """Returns the cookies of the sockets that the programs count."""
        cookies = set[int]()
        with self._listing:
            self._maps["chosen"].update(bytes(4), pack_u64(pod))
            for name in ("accounts", "owners"):
                with self._iterator(object_files.KNOWN, name) as link:
                    cookies.update(one for (one,) in _COOKIE.iter_unpack(iterator.read(link)))
        return cookies

    def records(self) -> Sequence[Any]:
        size = account_abi.RECORD.size
        with self._taking:
            data = b"" if self._ring is None else self._ring.take(size)
        return [
            *self._preexisting.records(),
            *self._late.records(),
            *(data[at : at + size] for at in range(0, len(data), size)),
        ]

    def connection(self, record: Any) -> Connection:
        return record if isinstance(record, Connection) else next(account_abi.connections(record, _epoch()))

    def ended_badly(self, record: Any) -> bool:
        return record.ended_badly if isinstance(record, Connection) else account_abi.ended_badly(record)

    async def arrived(self, seconds: float) -> None:
        """Returns early when a quarter of the ring buffer is full: then the programs wake the reader."""
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def wake() -> None:
            self._woken.poll(0)
            woken.set()

        loop.add_reader(self._woken.fileno(), wake)
        try:
            async with asyncio.timeout(seconds):
                await woken.wait()
        except TimeoutError:
            pass
        finally:
            loop.remove_reader(self._woken.fileno())

    def verify(self) -> Sequence[str]:
        wrong = self.programs.settle()
        self._shares.allow()
        return wrong

    def losses(self) -> Mapping[str, int]:
        counts = self._maps["losses"]
        losses = {
            loss.name.lower(): sum(unpack_int(value) for value in counts.lookup_percpu(pack_u32(loss)))
            for loss in account_abi.Loss
        }
        losses |= self._preexisting.losses()
        losses["record"] += self._ring.skipped if self._ring else 0
        return losses

    def close(self) -> None:
        self._preexisting.close()
        with self._taking:
            if self._ring is not None:
                self._ring.close()
                self._ring = None
                self._woken.close()

    def admit(self) -> None:
        """Knows the ztunnels that there are now, before they open anything in a pod. Raises KernelError."""
        try:
            self.programs.admit(self._ztunnels.keys())
            self._certain = True
        except KernelError:
            self._certain = False
            self._pods.doubt()  # else the programs would refuse ztunnel its ports
            raise

    def _own(self, target: PodNetns) -> bool:
        """Puts listeners that ztunnel had before our programs into map owners. Returns whether none is missing."""
        cookie = target.netns.id.cookie
        version = self._ztunnels.version()
        if not self._certain or not self._ztunnels.processes():
            return False
        if self._owned.get(cookie) != version:
            try:
                for one in self._ztunnels.every(target):
                    with Descriptor(one.open()) as held:
                        self._maps["owners"].update(pack_u32(held), _ZTUNNEL)
            except StaleError:  # it has just closed one
                return False
            self._owned[cookie] = version
        return True

    def _new_qualities(self) -> Iterator[Quality]:
        for key, value in self._maps["qualities"].items():
            old = self._qualities.get(key)
            if old != value:
                self._qualities[key] = value
                yield account_abi.quality(key, value, old)
            elif account_abi.pod_of(key) in self._gone:  # nothing has ended there since the last reading
                self._maps["qualities"].delete(key)
                del self._qualities[key]
        self._gone &= {account_abi.pod_of(key) for key in self._qualities}

    @contextmanager
    def _iterator(self, program: object_files.BpfProgram, over: str = "accounts") -> Iterator[int]:
        """Makes a link of this process's own: it attaches nothing unless it is read."""
        program = self.programs.loaded(program)
        with Descriptor(syscall.get(self.programs.pins.node.program(program))) as loaded:
            walked = None if program.object == object_files.FILES else self._maps[over].fd
            descriptor = iterator.attach(loaded, walked)
        with Descriptor(descriptor) as link:
            yield link


def _epoch() -> int:
    """Nanoseconds from the epoch to the zero of CLOCK_MONOTONIC."""
    return time.time_ns() - time.monotonic_ns()
