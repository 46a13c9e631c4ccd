# SPDX-License-Identifier: Apache-2.0
"""What goes wrong, how often and where: given to the API server of the tests beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Where(StrEnum):
    LIST = "list"  # a GET of a collection
    PAGE = "page"  # of a list, after the first
    WATCH = "watch"  # when a watch begins
    EVENT = "event"  # when a watch is about to send a line
    READ = "read"  # a GET of one object
    WRITE = "write"  # anything but GET
    ANY = "any"  # when a request begins


class Kind(StrEnum):
    STATUS = "status"  # an answer with `code` instead
    DELAY = "delay"  # `seconds` before it goes on
    HANG_UP = "hang up"  # the connection is aborted, with no answer
    CUT = "cut"  # aborted after `size` bytes of the body, or in the middle of an event's line
    CUT_SHORT = "cut short"  # the same, but the answer ends as if that were all
    STALL = "stall"  # nothing any more, and the connection stays open
    GONE = "gone"  # of a watch: an ERROR event with `code`
    GARBAGE = "garbage"  # of a watch: a line that is no event


@dataclass
class Fault:
    where: Where
    kind: Kind
    times: int = 1
    path: str = ""  # a part of the request's path
    code: int = 500
    reason: str = "InternalError"
    seconds: float = 0.05
    size: int = 200
    retry_after: str = ""


class Faults:
    """Each is met `times` times, in the order given."""

    def __init__(self) -> None:
        self.waiting: list[Fault] = []
        self.met: list[Fault] = []

    def add(self, where: str, kind: str, **more: object) -> None:
        self.waiting.append(Fault(Where(where), Kind(kind), **more))  # type: ignore[arg-type]

    def take(self, path: str, *places: Where) -> Fault | None:
        for fault in self.waiting:
            if fault.where in places and fault.path in path:
                fault.times -= 1
                if fault.times <= 0:
                    self.waiting.remove(fault)
                self.met.append(fault)
                return fault
        return None

    def clear(self) -> None:
        self.waiting, self.met = [], []
