# SPDX-License-Identifier: Apache-2.0
"""Lists and watches as the Kubernetes API has them: what is asked next, and what an answer means. Pure.

Time and randomness are arguments. Sources: kubernetes.io/docs/reference/using-api/api-concepts, client-go's reflector.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from agent.core.errors import KubeError, ProtocolError

Json = dict[str, Any]
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"
_LONGEST = 1 << 23  # bytes of one object; the API server takes 3 MB (server/config.go, MaxRequestBodyBytes)
_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"
_AFTER = frozenset(_SPACE + ",:]}")  # what may follow a value


class BusyError(KubeError):
    """The server asks to be left alone for `seconds` (Retry-After)."""

    def __init__(self, message: str, status: int, reason: str, seconds: float) -> None:
        super().__init__(message, status, reason)
        self.seconds = seconds


def refusal(what: str, status: int, body: bytes, head: Mapping[str, str]) -> KubeError:
    """Builds the error of an answer that is not 2xx: from a Status object, or a proxy's text. `head` in lower case."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        answer = {"message": body[:200].decode(errors="replace").strip()}
    reason, message = answer.get("reason"), answer.get("message")
    reason = reason if isinstance(reason, str) else ""
    line = f"{what}: {status} {reason}: {message}" if message else f"{what}: {status} {reason}"
    after = head.get("retry-after", "").strip()
    if status in (429, 503) and after.isascii() and after.isdecimal() and len(after) < 6:
        return BusyError(" ".join(line.split()), status, reason, float(after))
    return KubeError(" ".join(line.split()), status, reason)


class WatchVerb(StrEnum):
    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"
    BOOKMARK = "BOOKMARK"


class Rows:
    """A Table's rows as objects {"metadata", "cells" by column, "conditions"}; its headers come once per answer."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def headed(self, columns: Any) -> None:
        if isinstance(columns, list) and columns:
            self._names = [str(one.get("name", "")) if isinstance(one, dict) else "" for one in columns]

    def of(self, row: Json) -> Json:
        cells, inner = row.get("cells"), row.get("object")
        return {
            "metadata": inner.get("metadata") if isinstance(inner, dict) else None,
            "cells": dict(zip(self._names, cells, strict=False)) if isinstance(cells, list) else {},
            "conditions": row.get("conditions"),
        }

    def unfold(self, value: Json) -> list[Json]:
        """Returns the objects of one event: itself, or the rows of a Table."""
        if value.get("kind") != "Table":
            return [value]
        self.headed(value.get("columnDefinitions"))
        rows = value.get("rows")
        return [self.of(row) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


class Listing:
    """One answer to a list, taken apart as it comes: never more than one object of it is kept in memory.

    API servers ignore `limit` where they answer from their cache, so an answer may hold all of a cluster.
    """

    def __init__(self) -> None:
        self.metadata: Json = {}
        self._text = ""
        self._at = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._rows = Rows()
        self._key = ""
        self._inside = False
        self._ended = False
        self._begun = False
        self._whole = False

    def feed(self, data: bytes) -> list[Json]:
        """Returns the objects that are complete by now. Raises ProtocolError if it is not a list."""
        try:
            self._text = self._text[self._at :] + self._utf8.decode(data)
        except UnicodeDecodeError:
            raise ProtocolError("a list is not UTF-8") from None
        self._at = 0
        objects: list[Json] = []
        while not self._ended and self._step(objects):
            pass
        if len(self._text) - self._at > _LONGEST:
            raise ProtocolError(f"one object of a list is longer than {_LONGEST >> 20} MB, or it is not JSON")
        return objects

    def end(self) -> tuple[str, str]:
        """Its version, and the token to go on with, "" after the last page. Raises ProtocolError if it is not whole."""
        version = self.metadata.get("resourceVersion")
        more = self.metadata.get("continue") or ""
        if not self._ended or not self._whole or not isinstance(version, str) or not version:
            raise ProtocolError("a list ended early, or has no items or no resourceVersion")
        return version, more if isinstance(more, str) else ""

    def _step(self, objects: list[Json]) -> bool:
        """Reads one token or value. Returns False if more bytes are needed."""
        sign = self._peek()
        if not sign:
            return False
        if not self._begun:
            if sign != "{":
                raise ProtocolError("a list is no JSON object")
            self._begun = True
            self._at = self._at + 1
        elif sign in ",:":
            self._at += 1
        elif self._inside and sign == "]":
            self._inside = False
            self._key = ""
            self._whole = True
            self._at = self._at + 1
        elif not self._inside and sign == "}":
            self._ended = True
            self._at = self._at + 1
        elif not self._inside and self._key in ("items", "rows") and sign == "[":
            self._inside = True
            self._at = self._at + 1
        else:
            return self._value(objects)
        return True

    def _value(self, objects: list[Json]) -> bool:
        try:
            value, end = _DECODER.raw_decode(self._text, self._at)
        except (ValueError, RecursionError):
            return False
        if self._text[end : end + 1] not in _AFTER:
            return False  # a number could go on
        self._at = end
        if self._inside:
            if isinstance(value, dict):
                objects.append(self._rows.of(value) if self._key == "rows" else value)
        elif not self._key:
            if not isinstance(value, str):
                raise ProtocolError("a list is no JSON object")
            self._key = value
        else:
            self._field(value)
        return True

    def _field(self, value: Any) -> None:
        if self._key == "metadata" and isinstance(value, dict):
            self.metadata = value
        elif self._key == "columnDefinitions":
            self._rows.headed(value)
        elif self._key in ("items", "rows"):
            self._whole = value is None  # Go writes an empty slice that was never made as null
        self._key = ""

    def _peek(self) -> str:
        while self._at < len(self._text) and self._text[self._at] in _SPACE:
            self._at += 1
        return self._text[self._at : self._at + 1]


class Lines:
    """Splits a watch into lines; an incomplete one at its end is dropped."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._seen = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Raises ProtocolError for a line that does not end."""
        self._rest += data
        while (end := self._rest.find(b"\n", self._seen)) >= 0:
            line = bytes(self._rest[:end])
            self._seen = 0
            del self._rest[: end + 1]
            if line.strip():
                yield line
        self._seen = len(self._rest)
        if self._seen > _LONGEST:
            raise ProtocolError(f"a line of a watch is longer than {_LONGEST >> 20} MB")


def event(line: bytes) -> tuple[WatchVerb, Json]:
    """Raises KubeError for an ERROR event (it holds a Status), ProtocolError for what is no event."""
    try:
        value = json.loads(line)
        kind, body = value["type"], value["object"]
        if kind == "ERROR" and isinstance(body, dict):
            code = body.get("code")
            raise refusal("watch", code if isinstance(code, int) else 500, json.dumps(body).encode(), {})
        verb = WatchVerb(kind)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ProtocolError(f"a line of a watch is no event: {error!r:.200}") from None
    if not isinstance(body, dict):
        raise ProtocolError("an event of a watch holds no object")
    return verb, body


def version(value: Json) -> str:
    """Returns the collection's version at this object; of a Table its own or its row's. "" if it has none."""
    for metadata in (value.get("metadata"), *(one.get("metadata") for one in Rows().unfold(value))):
        number = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
        if isinstance(number, str) and number:
            return number
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds, but `page`: objects asked for at once."""

    first: float = 0.5  # pause after a failure; doubles
    last: float = 30.0
    longest: float = 300.0  # pause that a server may ask for
    watch: float = 240.0  # of one watch; up to a quarter more
    slack: float = 15.0  # by which it may end late
    quiet: float = 30.0  # without a byte of a list
    silence: float = 150.0  # without a byte of a watch, where bookmarks came: they do so once a minute (cacher.go)
    page: int = 500


class Course:
    """The state of a follower between a list and a watch.

    The first list is of resourceVersion "0": from the API server's cache, which has pods by node, where any other would
    read all of a cluster from etcd. Later ones are at least as new as what was seen; after 410, or 504 (the cache is
    older than that), as new as can be. A list counts with its last page; a watch continues from the last version.
    """

    def __init__(self, random: Callable[[], float], pace: Pace) -> None:
        self._random = random
        self._pace = pace
        self.listing = True  # whether a list is next, or a watch
        self.more = ""  # continue: a page of a list that has begun is next
        self._version = ""
        self._newest = False
        self._at_once = False
        self._failures = self._expired = 0
        self._due = self._began = 0.0
        self._received = self._marked = False
        self.seconds = 0  # that the watch was asked to last

    @property
    def silence(self) -> float:
        """Seconds without a byte after which the watch is given up."""
        longest = self.seconds + self._pace.slack
        return min(longest, self._pace.silence) if self._marked else longest

    def pause(self, now: float) -> float:
        """Seconds until the next request."""
        return max(0.0, self._due - now)

    def query(self, now: float) -> dict[str, str]:
        """Returns the query of the next request, which begins now."""
        self._began = now
        self._received = False
        if not self.listing:
            self.seconds = int(self._pace.watch * (1 + self._random() / 4)) or 1
            return {
                "watch": "1",
                "allowWatchBookmarks": "true",
                "resourceVersion": self._version,
                "timeoutSeconds": str(self.seconds),
            }
        limit = {} if self._at_once else {"limit": str(self._pace.page)}
        if self.more:
            return {**limit, "continue": self.more}
        if self._newest:
            return limit
        # With a limit a version would mean exactly that one, which is in etcd alone.
        return {"resourceVersion": self._version} if self._version else {**limit, "resourceVersion": "0"}

    def page(self, version: str, more: str) -> bool:
        """Takes a page of a list. Returns True if it was the last one, so the list is complete."""
        self.more = more
        if more:
            return False
        self._version = version
        self.listing = False
        self._newest = False
        self._at_once = False
        return True

    def received(self, version: str, bookmark: bool = False) -> None:
        """Takes an event or bookmark of the watch."""
        self._marked |= bookmark
        self._version = version or self._version
        self._failures = self._expired = 0
        self._received = True

    def ended(self, now: float) -> None:
        """Takes the regular end of a watch. One without any event or bookmark in its full time is not trusted."""
        full = now - self._began >= self._pace.watch
        self.listing = full and not self._received
        if self._received or full:
            self._failures = 0
            self._due = now
        else:
            self._wait(now)

    def failed(self, error: Exception, now: float) -> None:
        """Takes the failure of a request, or an invalid answer."""
        self._marked &= self._received  # should bookmarks have ceased, watches last their time again
        status = error.status if isinstance(error, KubeError) else -1
        gone = isinstance(error, KubeError) and (status == 410 or error.reason in ("Expired", "Gone"))
        if self.listing and (gone or status in (400, 504)):
            self._newest = True
            self._at_once = bool(self.more) or self._at_once
            self.more = ""
        if (gone and not self.listing) or status == -1:
            self.listing = True
            self.more = ""
        if gone and not self._expired:
            self._expired = 1  # once at once: nothing is wrong with the server
            self._due = now
            return
        self._wait(now)
        if isinstance(error, BusyError):
            asked = min(error.seconds, self._pace.longest) * (1 + self._random() / 4)  # not all nodes in one instant
            self._due = max(self._due, now + asked)

    def _wait(self, now: float) -> None:
        pace = self._pace
        self._due = now + min(pace.last, pace.first * 2**self._failures) * (0.5 + 0.5 * self._random())
        self._failures = min(self._failures + 1, 16)
