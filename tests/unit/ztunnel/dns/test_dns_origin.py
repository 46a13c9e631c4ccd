# SPDX-License-Identifier: Apache-2.0
"""The agent's map of resolvers: its bytes, and that the pin which is there now is the one that is asked."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.core.errors import KernelError
from agent.kernel.bpf import asked_resolvers
from agent.kernel.bpf.asked_resolvers import Asked, decode, encode
from agent.kernel.netns import SO_NETNS_COOKIE
from agent.ztunnel.dns import forwarding

CLIENT = ("10.0.0.2", 0x1234)
V4 = bytes(10) + b"\xff\xff\x0a\x00\x00\x35" + b"\x00\x35" + bytes(6)
V6 = bytes.fromhex("fd770000000000000000000000000053") + b"\x14\xe9" + bytes(6)


class FakeMap:
    """What is pinned is a file with the value; opening is remembered."""

    opened: list[FakeMap]

    def __init__(self, path: Path) -> None:
        self.text = path.read_text()
        self.closed = False
        self.keys = list[bytes]()
        self.opened.append(self)
        if self.text == "broken":
            raise KernelError("open", 1, "not permitted")

    @classmethod
    def open(cls, path: Path) -> FakeMap:
        return cls(path)

    def lookup(self, key: bytes) -> bytes | None:
        assert not self.closed
        self.keys.append(key)
        return bytes.fromhex(self.text) if self.text else None

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[FakeMap]:
    monkeypatch.setattr(FakeMap, "opened", [], raising=False)
    monkeypatch.setattr(asked_resolvers, "Map", FakeMap)
    return FakeMap.opened


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        yield made


def pin(folder: Path, text: str) -> None:
    place = folder / "v1/maps/resolvers"
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_name("fresh")  # so that it has another inode than the one before
    fresh.write_text(text)
    fresh.rename(place)


def test_the_bytes_are_those_of_abi_h() -> None:
    """struct query and struct resolver."""
    assert encode(0x0102030405060708, 0x1234) == bytes.fromhex("08070605040302011234110000000000")
    assert decode(V4) == ("10.0.0.53", 53)
    assert decode(V6) == ("fd77::53", 5353)


def test_the_namespace_and_port_are_asked_for(tmp_path: Path, opened: list[FakeMap], listener: socket.socket) -> None:
    pin(tmp_path, V4.hex())
    made = Asked(str(tmp_path))
    assert made.resolver(listener, CLIENT) == ("10.0.0.53", 53)
    cookie = listener.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    assert opened[0].keys == [cookie + bytes.fromhex("1234110000000000")]
    made.resolver(listener, CLIENT)
    assert len(opened) == 1  # kept open
    made.close()
    made.close()
    assert opened[0].closed


def test_the_map_comes_goes_and_comes_back(tmp_path: Path, opened: list[FakeMap], listener: socket.socket) -> None:
    made = Asked(str(tmp_path))
    assert made.resolver(listener, CLIENT) is None and not opened
    pin(tmp_path, V4.hex())
    assert made.resolver(listener, CLIENT) == ("10.0.0.53", 53)
    pin(tmp_path, "")  # another one, which does not know it
    assert made.resolver(listener, CLIENT) is None and opened[0].closed
    (tmp_path / "v1/maps/resolvers").unlink()
    assert made.resolver(listener, CLIENT) is None and opened[1].closed and len(opened) == 2
    pin(tmp_path, V6.hex())
    assert made.resolver(listener, CLIENT) == ("fd77::53", 5353)


def test_one_that_cannot_be_opened_is_told_once(
    tmp_path: Path, opened: list[FakeMap], listener: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    made = Asked(str(tmp_path))
    pin(tmp_path, "broken")
    assert [made.resolver(listener, CLIENT) for _ in range(3)] == [None] * 3
    assert len(opened) == len(caplog.records) == 1
    pin(tmp_path, V4.hex())
    assert made.resolver(listener, CLIENT) == ("10.0.0.53", 53)


class Answers:
    """Stands for conntrack or for the map."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, 0

    def original_destination(self, *_: object) -> Any:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    resolver = original_destination


FAILED = KernelError("conntrack lookup", 95, "not supported")


@pytest.mark.parametrize(
    ("conntrack", "ebpf", "found", "asks"),
    [
        (("10.0.0.53", 53), ("10.0.0.54", 53), ("10.0.0.53", 53), 0),  # conntrack comes first
        (None, ("10.0.0.54", 53), ("10.0.0.54", 53), 1),
        (("127.0.0.1", 15053), ("10.0.0.54", 53), ("10.0.0.54", 53), 1),  # tracked, but not redirected there
        (("127.0.0.1", 15053), None, None, 1),
        (None, ("10.0.0.54", 15053), None, 1),  # would come back to ourselves
        (None, None, None, 1),
        (FAILED, ("10.0.0.54", 53), ("10.0.0.54", 53), 1),  # a kernel without conntrack
    ],
)
def test_who_is_asked_for_the_resolver(
    listener: socket.socket, conntrack: Any, ebpf: Any, found: Any, asks: int
) -> None:
    remembers = Answers(ebpf)
    pod: Any = SimpleNamespace(engine=SimpleNamespace(asked=remembers))
    resolver = forwarding.Resolver(pod, Answers(conntrack))  # type: ignore[arg-type]
    answer, own = resolver.original(listener, CLIENT)
    assert answer == found and own == (found is not None and found == conntrack)
    assert remembers.asked == asks


def test_conntracks_own_words_when_nobody_knows(listener: socket.socket) -> None:
    pod: Any = SimpleNamespace(engine=SimpleNamespace(asked=Answers(None)))
    with pytest.raises(KernelError, match="not supported"):
        forwarding.Resolver(pod, Answers(FAILED)).original(listener, CLIENT)  # type: ignore[arg-type]
