# SPDX-License-Identifier: Apache-2.0
"""DNS queries of one pod, each joined with its answer, from copies of the packets. Pure; packets may be hostile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agent.core.model.pods import Pod
from agent.core.names import DNS_PORT
from agent.core.text import utc
from agent.core.wire import dns_message
from agent.core.wire.dns_filter import PORT
from agent.core.wire.packet import TCP, Packet, parse

PATIENCE: Final = 5.0  # seconds; a resolver library gives up, or asks again, after as many
MOST_PENDING: Final = 1024  # queries of a pod
_COPY: Final = 0.005  # seconds in which a query passes the pod's interfaces: a bridge and its port, a VLAN
NO_ANSWER: Final = "no answer"
_SILENCE: Final = 3.0  # seconds; the embedded ztunnel answers for a silent resolver after 4: with SERVFAIL
Client = tuple[str, int]  # address and port
Asked = Callable[[int, Client, Client], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsQuery:
    """`time` is Unix time; `seconds` that until the answer, None without one. `resolver` is "" where it is unknown.

    `captured`: it went to ztunnel. `name` is printable; `addresses` are those of the answer, for `ttl` seconds.
    """

    time: float
    pod: Pod
    name: str
    type: str
    code: str
    seconds: float | None
    resolver: str
    captured: bool
    protocol: str
    addresses: tuple[str, ...] = ()
    ttl: int = 0

    @property
    def silent(self) -> bool:
        """Returns whether the resolver seems to have said nothing; ztunnel may have answered in its place."""
        late = self.captured and self.code == "SERVFAIL" and (self.seconds or 0) >= _SILENCE
        return late or self.code == NO_ANSWER

    def as_dict(self) -> dict[str, Any]:
        return {
            "time": utc(self.time, "milliseconds"),
            "namespace": self.pod.namespace,
            "pod": self.pod.name,
            "name": self.name,
            "type": self.type,
            "rcode": self.code,
            "latency_seconds": None if self.seconds is None else round(self.seconds, 6),
            "resolver": self.resolver,
            "captured": self.captured,
            "protocol": self.protocol,
            "addresses": list(self.addresses),
        }


@dataclass(frozen=True, slots=True)
class _Pending:
    time: float
    message: dns_message.DnsMessage
    local: Client  # where it was sent: to the resolver, or to ztunnel


class PodQueries:
    """The queries of one pod that wait for their answers. For one thread."""

    def __init__(self, pod: Pod, asked: Asked) -> None:
        """Takes `asked`, which returns the resolver that a captured query was meant for, or "".

        Its arguments are the protocol's number, where ztunnel received the query, and the client.
        """
        self.pod = pod
        self._asked = asked
        self._pending: dict[tuple[int, str, int, int], _Pending] = {}  # oldest first

    @property
    def waiting(self) -> bool:
        return bool(self._pending)

    def add(self, packets: Sequence[tuple[float, bytes]]) -> Iterator[DnsQuery]:
        """Yields the queries that have been answered, or asked again before an answer came."""
        for time, data in packets:
            if (packet := parse(data)) is None:
                continue
            for message in _messages(packet):
                if message.is_answer:
                    yield from self._answered(time, packet, message)
                else:
                    yield from self._asks(time, packet, message)

    def expire(self, now: float) -> Iterator[DnsQuery]:
        """Yields the queries that have waited for PATIENCE."""
        while self._pending:
            key = next(iter(self._pending))
            if now - self._pending[key].time < PATIENCE:
                return
            yield self._record(key, self._pending.pop(key))

    def forget(self) -> int:
        """Drops the pending queries, as packets were lost that may be their answers; returns how many."""
        count = len(self._pending)
        self._pending.clear()
        return count

    def _asks(self, time: float, packet: Packet, message: dns_message.DnsMessage) -> Iterator[DnsQuery]:
        key = packet.protocol, packet.source, packet.source_port, message.number
        before = self._pending.get(key)
        if before is not None and before.message == message and time - before.time < _COPY:
            return
        self._pending.pop(key, None)
        if before is None and len(self._pending) >= MOST_PENDING:
            key_of_oldest = next(iter(self._pending))
            yield self._record(key_of_oldest, self._pending.pop(key_of_oldest))
        if before is not None:
            yield self._record(key, before)
        self._pending[key] = _Pending(time, message, (packet.destination, packet.destination_port))

    def _answered(self, time: float, packet: Packet, message: dns_message.DnsMessage) -> Iterator[DnsQuery]:
        key = packet.protocol, packet.destination, packet.destination_port, message.number
        query = self._pending.get(key)
        if query is None or (message.name and message.name.lower() != query.message.name.lower()):
            return  # another's: of ztunnel's own query, or a forged one
        del self._pending[key]
        source = packet.source if packet.source_port == PORT else ""
        yield self._record(key, query, answer=message, seconds=max(0.0, time - query.time), resolver=source)

    def _record(
        self,
        key: tuple[int, str, int, int],
        query: _Pending,
        *,
        answer: dns_message.DnsMessage | None = None,
        seconds: float | None = None,
        resolver: str = "",
    ) -> DnsQuery:
        protocol, address, port, _ = key
        captured = query.local[1] == DNS_PORT
        if not captured:
            resolver = query.local[0]
        return DnsQuery(
            time=query.time,
            pod=self.pod,
            name=query.message.name,
            type=dns_message.type_word(query.message.kind),
            code=dns_message.code_word(answer.code) if answer else NO_ANSWER,
            seconds=seconds,
            resolver=resolver or self._asked(protocol, query.local, (address, port)),
            captured=captured,
            protocol="tcp" if protocol == TCP else "udp",
            addresses=answer.addresses if answer else (),
            ttl=answer.ttl if answer else 0,
        )


def _messages(packet: Packet) -> Iterator[dns_message.DnsMessage]:
    """Yields the messages that begin in the packet; by TCP each follows its length."""
    rest = packet.payload
    while rest:
        data, rest = (rest[2 : 2 + int.from_bytes(rest[:2])], rest[2 + int.from_bytes(rest[:2]) :]) if (
            packet.protocol == TCP
        ) else (rest, b"")  # fmt: skip
        if (message := dns_message.read(data)) is None:
            return
        yield message
