# SPDX-License-Identifier: Apache-2.0
"""The connections of one pod, from dumps of its sockets and reports of their ends. Pure: the clock is an argument.

ztunnel's end, in the same namespace, shows the fate of a connection. The two ends end in either order, so an ended
connection is held back for HOLD seconds until its other end is seen. A connection that then has neither a mirror nor a
reason to be exempt has leaked if that is proven: a dump has shown that an application holds it, and conntrack that it
was not redirected; or two dumps have shown it, and no connection that ztunnel accepted is without its mirror. Otherwise
it stays undecided: at its end a socket of ztunnel's looks like an application's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from math import inf

from agent.core.model.sockets import CAPTURE_PORTS, Endpoint, TcpSocket, TcpState
from agent.core.names import HBONE_PORT
from agent.core.wire.tcp_info import TcpReport
from agent.flows.inet_diag import ending
from agent.flows.inet_diag.flow import HOLD, LOOKS, Stage, TrackedFlow
from agent.flows.inet_diag.mirror_search import MirrorSearch
from agent.flows.inet_diag.pairing import TAKES_OUTBOUND
from agent.flows.inet_diag.totals import Sums
from agent.flows.inet_diag.verdict import Verdicts
from agent.flows.inet_diag.ztunnel_upstreams import Onward
from agent.flows.record import Connection, Direction, Fate, Reason


class PodFlows:
    """Tracks the sockets of one pod; for one thread at a time.

    `held` picks the inodes of sockets that ztunnel holds. `foreign` returns the cookies of those listeners on
    ztunnel's ports that are not ztunnel's. `replies` returns source and destination of the replies to a connection from
    one endpoint to another, None if that is unknown.
    """

    def __init__(
        self,
        pod: int,
        *,
        verdicts: Verdicts,
        held: Callable[[Collection[int]], Collection[int]],
        foreign: Callable[[Sequence[TcpSocket]], Collection[int]] = lambda sockets: (),
        replies: Callable[[Endpoint, Endpoint], tuple[Endpoint, Endpoint] | None] = lambda client, service: None,
        captured: bool,
    ) -> None:
        self.pod = pod
        self.verdicts = verdicts
        self.captured = captured
        self.sums = Sums(pod)
        self._held = held
        self._foreign = foreign
        self._owned: Collection[int] = ()  # inodes of the last dump's sockets that ztunnel holds
        self._shared: frozenset[int] = frozenset()  # ports of ztunnel on which others listen, too
        self._flows: dict[int, TrackedFlow] = {}  # by cookie, and for a while after the end
        self._pending: dict[int, TrackedFlow] = {}  # live ones of unknown fate, and what has ended
        self._unlooked: list[TrackedFlow] = []  # ended since the last dump
        self._finished = deque[tuple[float, TrackedFlow]]()  # ended and reported, but other flows may look them up
        self._search = MirrorSearch(self._flows, replies)
        self._onward = Onward()
        self._torn = 0.0  # until when notifications may be missing
        self._doubtful = False
        self._alone = False  # True: only pre-existing connections are followed
        self._listeners: frozenset[int] = frozenset()  # ports of listeners in the last two dumps
        self._last_ports: frozenset[int] = frozenset()  # of those in the last one

    @property
    def unsettled(self) -> bool:
        """True if a connection has ended of which a dump may show more."""
        return bool(self._unlooked)

    @property
    def doubtful(self) -> bool:
        """True if sockets of the last dump have ztunnel's mark and ztunnel did not hold them when it was asked.

        ztunnel may have closed them in between: one that is in the next dump, too, is not ztunnel's.
        """
        return self._doubtful

    def dumped(
        self, reports: Iterable[TcpReport], timers: Mapping[bytes, TcpState], now: float, *, complete: bool = False
    ) -> int:
        """Takes a dump of all sockets of the pod, and the timers of those in TIME_WAIT.

        `complete`: notifications were lost, so a flow that is not in this dump has ended; returns the number of these.
        """
        ports = set()
        seen = set()
        self._doubtful = False
        capturing = []
        reports = tuple(reports)
        self._owned = self._held(marked) if (marked := {*self._marked(reports)}) else ()
        for report in reports:
            if report.socket.state is TcpState.LISTEN:
                ports.add(report.socket.local[1])
                if report.socket.local[1] in CAPTURE_PORTS:
                    capturing.append(report.socket)
            elif report.used and self._is_followed(report.socket.cookie):
                seen.add(report.socket.cookie)
                self._see(report, now)
        self._listeners = frozenset(ports) | self._last_ports  # also those closed since the last dump
        self._last_ports = frozenset(ports)
        foreign = self._foreign(capturing) if capturing else ()
        self._shared = frozenset(one.local[1] for one in capturing if one.cookie in foreign)
        for flow in self._unlooked:
            flow.timer = timers.get(flow.report.ends)
            flow.looked = True
        self._unlooked.clear()
        known = self._flows.values() if complete else ()
        missed = [one for one in known if one.closed is None and one.cookie not in seen]
        self._torn = now if complete else self._torn
        for flow in missed:
            flow.closed = now
            flow.looked = True
            self._pending[flow.cookie] = flow
        return len(missed)

    def ended(self, report: TcpReport, now: float) -> None:
        """Takes the report of a destroyed socket."""
        one = report.socket
        flow = self._flows.get(one.cookie)
        if flow is None:
            if self._alone:
                return
            flow = self._add(report, now)
            flow.opened = min(now, ending.begun(report, now))
        if flow.closed is not None:
            return  # it counted as ended when notifications were lost
        if report.disconnected and flow.looks:
            flow.last = flow.report.info
        flow.report = report
        flow.closed = now
        self._unlooked.append(flow)
        self._pending[flow.cookie] = flow

    def change(self, verdicts: Verdicts, *, captured: bool) -> None:
        """Applies to flows from now on; call it after all earlier dumps and ends were taken."""
        if captured and not self.captured:
            for flow in self._flows.values():
                flow.preexisting = flow.preexisting or not flow.decided
        self.verdicts = verdicts
        self.captured = captured

    def only_preexisting(self, counted: Collection[int]) -> None:
        """Marks all flows pre-existing and follows no others from now on, nor `counted`: cookies counted elsewhere.

        Call it after two dumps, with `counted` read between them: a flow in only one dump may be missing from it.
        """
        self._alone = True
        for flow in list(self._flows.values()):
            if flow.looks < 2 or flow.cookie in counted:
                self._pending.pop(flow.cookie, None)
                self._forget(flow)
        self.mark_preexisting()

    def mark_preexisting(self) -> None:
        """Marks all flows as older than the account: their bytes up to now are not added."""
        for flow in self._flows.values():
            flow.preexisting = True
            flow.direction = flow.inferred_direction(self._listeners)
            flow.sent, flow.received = flow.payload()

    @property
    def over(self) -> bool:
        """True if only pre-existing connections are followed and all of them have ended."""
        waiting = any(flow.closed is not None for flow in self._pending.values())
        return self._alone and not waiting and all(one.closed or one.owned for one in self._flows.values())

    def settle(self, now: float, *, all_of_it: bool = False) -> list[Connection]:
        """Decides what can be decided; returns the records of ended flows. `all_of_it`: none is held back any more."""
        records: list[Connection] = []
        self._search.begin(self._pending.values())
        for stage in Stage:
            due = inf if all_of_it else now - HOLD * stage.value
            for flow in list(self._pending.values()):
                if flow.closed is not None and flow.closed > due:
                    continue
                patient = flow.closed is not None and not all_of_it and now - flow.closed < HOLD
                if self._decide(flow, stage) and not (patient and flow.incomplete(self._flows.get(flow.mirror))):
                    del self._pending[flow.cookie]
                    if flow.closed is not None:
                        records += self._end(flow, now)
        while self._finished and self._finished[0][0] < now - 3 * HOLD:
            self._forget(self._finished.popleft()[1])
        return records

    def count(self) -> None:
        """Adds to the sums what live connections have transferred since the last call."""
        for flow in self._flows.values():
            if flow.closed is None and flow.decided:
                self._count(flow)

    def live(self) -> Iterator[Connection]:
        for flow in self._flows.values():
            if flow.closed is None and not flow.owned:
                yield flow.connection(self.pod, self._flows.get(flow.mirror))

    def _is_followed(self, cookie: int) -> bool:
        """Returns False for a flow that is known to have ended."""
        flow = self._flows.get(cookie)
        return not self._alone if flow is None else flow.closed is None

    def _see(self, report: TcpReport, now: float) -> None:
        one = report.socket
        flow = self._flows.get(one.cookie) or self._add(report, now)
        flow.report = report
        flow.state = one.state
        flow.looks += 1
        if (flow.local, flow.remote) != (one.local, one.remote):  # a socket in SYN_SENT may not have an address yet
            self._search.drop(flow)
            flow.local = one.local
            flow.remote = one.remote
            self._search.add(flow)
        if one.inode:
            flow.owned = flow.owned or one.inode in self._owned
            if flow.marked or not one.of_ztunnel:
                flow.user = one.uid
            self._doubtful = self._doubtful or (flow.user < 0 and not flow.owned)
            flow.marked = one.of_ztunnel

    def _marked(self, reports: Iterable[TcpReport]) -> Iterator[int]:
        """Yields inodes of sockets with ztunnel's mark, unless their owner is known already."""
        for one in (report.socket for report in reports):
            flow = self._flows.get(one.cookie)
            if one.inode and one.of_ztunnel and not (flow and (flow.owned or flow.decided)):
                yield one.inode

    def _add(self, report: TcpReport, now: float) -> TrackedFlow:
        one = report.socket
        flow = TrackedFlow(
            one.cookie,
            one.local,
            one.remote,
            opened=now,
            verdicts=self.verdicts,
            preexisting=not self.captured,
            report=report,
        )
        flow.shared = one.local[1] in self._shared
        self._flows[flow.cookie] = self._pending[flow.cookie] = flow
        self._search.add(flow)
        return flow

    def _decide(self, flow: TrackedFlow, stage: Stage) -> bool:
        """Returns True if fate, reason and direction are final now."""
        if flow.decided:
            return True
        if flow.closed is None and not flow.established:
            return False
        late = flow.lost or (flow.hidden and self.verdicts.own(flow.remote[0]))  # eBPF may have led it to ztunnel
        if stage is Stage.MIRRORS:
            flow.decided = (
                flow.check_owner(self.verdicts.own) or self._by_mirror(flow) or (not late and self._exempt(flow))
            )
        elif flow.active and flow.established and stage is Stage.CONNTRACK:
            flow.decided = self._captured(flow, self._search.by_conntrack(flow))
        elif flow.active and flow.closed is not None and stage is Stage.ONWARD:
            flow.decided = self._onward.adopt(flow, loosely=False)
        elif flow.active and flow.closed is not None and stage is Stage.LATE:
            flow.decided = self._captured(flow, self._search.stray(flow)) or self._onward.adopt(flow, loosely=True)
        elif stage is Stage.REST:
            flow.decided = (late and not flow.awaits_mirror and self._exempt(flow)) or self._rest(flow)
        return flow.decided

    def _by_mirror(self, flow: TrackedFlow) -> bool:
        own = self.verdicts.own
        if (other := self._search.mirror(flow, own)) is None:
            return False
        if other.check_owner(own):
            return self._captured(flow, other)
        if not own(flow.remote[0]):
            return False
        flow.direction = flow.inferred_direction(self._listeners)
        flow.fate = Fate.EXEMPT
        flow.reason = Reason.LOOPBACK
        flow.mirror = other.cookie
        return True

    def _captured(self, flow: TrackedFlow, mirror: TrackedFlow | None) -> bool:
        """Returns False if there is no mirror."""
        if mirror is None:
            return False
        flow.direction = Direction.OUTBOUND if mirror.accepted_by_ztunnel else Direction.INBOUND
        flow.fate = Fate.CAPTURED
        flow.reason = Reason.NONE
        flow.mirror = mirror.cookie
        self._search.found(mirror, flow)
        return True

    def _exempt(self, flow: TrackedFlow) -> bool:
        flow.direction = flow.inferred_direction(self._listeners)
        if flow.lost:
            reason = Reason.LOOPBACK if self.verdicts.own(flow.remote[0]) else None
        elif flow.active:
            reason = flow.verdicts.outbound(flow.remote, flow.user)
        else:
            reason = flow.verdicts.inbound(flow.remote, flow.local)
        if reason is None and flow.preexisting:
            reason = Reason.BEFORE if flow.established else None
            if flow.awaits_mirror:
                return False
        flow.reason = reason or Reason.NONE
        flow.fate = Fate.EXEMPT if reason else Fate.UNDECIDED
        return reason is not None

    def _rest(self, flow: TrackedFlow) -> bool:
        """Decides on a flow with neither mirror nor reason."""
        proven = flow.user >= 0 and self._bypassed(flow)
        if flow.closed is None and not proven:
            return False
        if not flow.established:
            return True
        # Between nodes ztunnel shares connections, and one may open and close unseen.
        flow.owned = flow.active and flow.user < 0 and flow.remote[1] == HBONE_PORT
        flow.fate = Fate.LEAKED if proven else Fate.UNDECIDED
        return True

    def _bypassed(self, flow: TrackedFlow) -> bool:
        """Returns True if it is proven that ztunnel did not accept a connection without a mirror."""
        if flow.awaits_mirror:  # a dump may miss the mirror
            return False
        if flow.active and flow.replies:
            return not flow.redirected
        strays = flow.active and self._search.has_strays
        torn = flow.opened <= self._torn  # the end of the mirror may not have been notified
        return flow.looks + flow.looked >= LOOKS and not strays and not torn

    def _end(self, flow: TrackedFlow, now: float) -> list[Connection]:
        self._finished.append((now, flow))
        self._count(flow)
        if flow.owned:
            if flow.local[1] in TAKES_OUTBOUND:
                self._onward.accepted(flow)
            elif flow.active and not flow.mirrored:
                self._onward.made(flow)
            return []
        record = flow.connection(self.pod, self._flows.get(flow.mirror))
        self.sums.ended(record)
        return [record]

    def _count(self, flow: TrackedFlow) -> None:
        """Adds what one connection has transferred since it was last counted."""
        if self._alone and flow.owned:
            return  # the collector that counts the rest knows ztunnel's own connections
        if not flow.established:
            self.sums.add(flow.key, failed=1, socket=flow.cookie)
            return
        mirror = self._flows.get(flow.mirror)
        opened = int(not flow.reported)
        closed = int(flow.closed is not None)
        grown = flow.take_growth(mirror.info if mirror else None)
        if opened or closed or any(grown):
            sent, received = (0, 0) if flow.owned else grown
            self.sums.add(flow.key, opened=opened, closed=closed, sent=sent, received=received, socket=flow.cookie)

    def _forget(self, flow: TrackedFlow) -> None:
        self._onward.forget(flow)
        self._search.drop(flow)
        self._flows.pop(flow.cookie, None)
