# SPDX-License-Identifier: Apache-2.0
"""The kinds of values that settings take: how each is read from files, the environment and flags. Pure.

A value comes as YAML has it or as text. `parse` returns it as the setting holds it, or raises ValueError with what it
should have been, as in "true or false". `takes` is the placeholder of the setting's flag.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from agent.core.errors import SettingsError
from agent.core.policy import selectors
from agent.core.policy.selectors import Selector


class Kind(Protocol):
    """One kind of value."""

    @property
    def takes(self) -> str: ...

    def parse(self, value: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Flag:
    takes: str = "true|false"

    def parse(self, value: Any) -> bool:
        text = str(value).lower()
        if text not in ("true", "false"):
            raise ValueError("true or false")
        return text == "true"


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number from `least` to `most`."""

    least: int
    most: int
    takes: str = "NUMBER"

    def parse(self, value: Any) -> int:
        text = str(value)
        if not text.isascii() or not text.isdecimal() or len(text) > 20 or not self.least <= int(text) <= self.most:
            raise ValueError(f"a whole number from {self.least} to {self.most}")
        return int(text)


@dataclass(frozen=True, slots=True)
class Seconds:
    """A number of seconds, at most an hour."""

    takes: str = "SECONDS"

    def parse(self, value: Any) -> float:
        try:
            number = float("yes" if isinstance(value, bool) else value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("a number of seconds") from None
        if not 0 < number <= 3600:
            raise ValueError("a number of seconds between 0 and 3600")
        return number


@dataclass(frozen=True, slots=True)
class Text:
    """Text; `fits` decides whether it is valid, `what` describes valid text. Empty text is valid if `optional`."""

    takes: str = "TEXT"
    what: str = "text"
    fits: Callable[[str], object] = field(default=lambda text: True)
    optional: bool = False

    def parse(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError("text")
        if not (self.optional and not value) and not self.fits(value):
            raise ValueError(self.what)
        return value


@dataclass(frozen=True, slots=True)
class Choice:
    """One word of a few. `former` words of earlier versions are accepted, and mean the first one."""

    words: tuple[str, ...]
    former: tuple[str, ...] = ()

    @property
    def takes(self) -> str:
        return "|".join(self.words)

    def parse(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError("text")
        if value not in (*self.words, *self.former):
            raise ValueError("one of " + ", ".join(self.words))
        return value


@dataclass(frozen=True, slots=True)
class Address:
    """An IP address of that version, as the ipaddress module writes it."""

    version: int
    takes: str = "ADDRESS"

    def parse(self, value: Any) -> str:
        return address(Text().parse(value), self.version)


@dataclass(frozen=True, slots=True)
class List:
    """A list of words, or text separated by commas. `each` returns a word as it is kept, or raises ValueError."""

    each: Callable[[str], str] = field(default=lambda word: word)
    takes: str = "LIST"

    def parse(self, value: Any) -> tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise ValueError("a list of names")
        return tuple(self.each(part.strip()) for part in parts if part.strip())


@dataclass(frozen=True, slots=True)
class Selectors:
    """A list of {podSelector, namespaceSelector}, or JSON of one."""

    takes: str = "JSON"

    def parse(self, value: Any) -> tuple[Selector, ...]:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise ValueError("JSON: a list of {podSelector, namespaceSelector}") from None
        try:
            return selectors.parse(value)
        except SettingsError as wrong:
            raise ValueError(f"usable: {wrong}") from None


def address(value: str, version: int | None = None) -> str:
    """Parses an address, as the ipaddress module writes it. Raises ValueError."""
    try:
        parsed = ipaddress.ip_address(value)
    except ValueError:
        parsed = None
    if parsed is None or version not in (None, parsed.version) or getattr(parsed, "scope_id", None):
        raise ValueError(f"an IPv{version} address" if version else "a list of addresses")
    return str(parsed)


def matching(pattern: str, what: str) -> Callable[[str], str]:
    """Requires that form of each word of a list."""
    compiled = re.compile(pattern)

    def each(word: str) -> str:
        if not compiled.fullmatch(word):
            raise ValueError(what)
        return word

    return each


def _host_port(value: str) -> bool:
    host, _, port = value.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 65536


_URL = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[-a-zA-Z0-9.]+)(:[0-9]{1,5})?")
_CONF_NAME = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.]{0,200}\.conflist")
FLAG = Flag()
SECONDS = Seconds()
TEXT = Text()
FILE = Text("PATH")
# Sockets lie in it: their addresses have 108 characters.
PATH = Text("PATH", "an absolute path of at most 90 characters", lambda text: text.startswith("/") and len(text) <= 90)
OPTIONAL_DIRECTORY = Text("PATH", "an absolute path", lambda text: text.startswith("/"), optional=True)
LOG_FILE = Text(
    "PATH", "an absolute path, or - for the standard output", lambda text: text.startswith("/") or text == "-", True
)
HOST_PORT = Text("ADDRESS:PORT", "address:port", _host_port, optional=True)
API_SERVER = Text(
    "URL", "a URL like https://10.96.0.1:443, or none", lambda text: text == "none" or _URL.fullmatch(text), True
)
CONF_NAME = Text("TEXT", "a file name that ends with .conflist", _CONF_NAME.fullmatch)
