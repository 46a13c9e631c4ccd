# SPDX-License-Identifier: Apache-2.0
"""bpf/account.h says in C what agent/flows says in Python: compared by BTF, and by what the programs' maps are like."""

from __future__ import annotations

import errno
import re
import struct
import sys
from dataclasses import fields
from enum import IntEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from support.abi import BPF, Types, mutations, types_in, types_of
from support.bpfnode import bpf_node

from agent.backends.ebpf import object_files
from agent.backends.ebpf.abi import address
from agent.core.errors import CommandError, KernelError
from agent.flows.ebpf import account_abi, collector
from agent.flows.ebpf.account_abi import CounterValue, Loss, Share, Shared
from agent.flows.record import DURATION_BOUNDS, RTT_BOUNDS, Closer, Connection, Direction, Fate, How, Quality, Reason
from agent.kernel.bpf import load
from agent.kernel.bpf.map import Map

pytestmark = pytest.mark.root
HEADER = BPF / "account.h"
OBJECTS = sorted({one.object for one in object_files.ACCOUNTING})
LOCAL, REMOTE, PEER = "10.1.2.3", "fd00::1:2:3", "127.9.8.7"
BIG = 0x1122334455667788


def check(types: Types) -> None:
    """Raises AssertionError where C and Python differ."""
    for part in (check_records, check_tallies, check_qualities, check_shares, check_destinations, check_enums):
        part(types)


def check_records(types: Types) -> None:
    numbers = {name: BIG + n for n, name in enumerate(("pod", "socket", "opened", "closed", "sent", "received"))}
    numbers |= {"opened": 5_000_000_000, "closed": 9_000_000_000}
    counts = ("segments_out", "segments_in", "retransmitted", "rtt", "user", "process")
    numbers |= {name: 0x11223344 + n for n, name in enumerate(counts)}
    ends = {"local": LOCAL, "remote": REMOTE, "peer": PEER}
    made = types.pack(
        "record", **numbers, **{name: address(ip_address(text)) for name, text in ends.items()},
        local_port=b"\x12\x34", remote_port=b"\x12\x35", peer_port=b"\x12\x36", command=b"a name".ljust(16, b"\0"),
        direction=1, fate=3, reason=11, how=7, closer=2, established=1,
    )  # fmt: skip
    opened, closed = ((numbers[name] + 7) / 1e9 for name in ("opened", "closed"))
    wanted = Connection(
        pod=numbers["pod"],
        socket=numbers["socket"],
        direction=Direction.INBOUND,
        fate=Fate.LEAKED,
        reason=Reason.RAW,
        local=(LOCAL, 0x1234),
        remote=(REMOTE, 0x1235),
        opened=opened,
        closed=closed,
        peer=(PEER, 0x1236),
        established=True,
        sent=numbers["sent"],
        received=numbers["received"],
        segments_out=numbers["segments_out"],
        segments_in=numbers["segments_in"],
        retransmitted=numbers["retransmitted"],
        rtt=numbers["rtt"] / 1e6,
        how=How.UNKNOWN,
        closer=Closer.REMOTE,
        user=numbers["user"],
        process=numbers["process"],
        command="a name",
    )
    assert list(account_abi.connections(made + made, 7)) == [wanted, wanted]


def check_tallies(types: Types) -> None:
    key = types.pack(
        "tally_key", pod=BIG, remote=address(ip_address(REMOTE)), port=b"\x12\x34", direction=1, fate=2, reason=5
    )
    wanted = BIG, Direction.INBOUND, Fate.EXEMPT, Reason.EXCLUDED_USER, REMOTE, 0x1234
    assert account_abi.tally_key(key) == wanted
    sort = types.pack("tally_key", pod=0, remote=bytes(16), port=b"\0\0", direction=1, fate=2, reason=5)
    assert account_abi.sort_key(*wanted[1:4]) == sort
    counts = {name: BIG + n for n, name in enumerate(("opened", "closed", "failed", "sent", "received", "socket"))}
    assert account_abi.tally(types.pack("tally", **counts)) == CounterValue(**counts)
    assert account_abi.TALLY.pack(*counts.values()) == types.pack("tally", **counts)
    assert [one.name for one in fields(CounterValue)] == [*types.structs["tally"][1]]


def check_qualities(types: Types) -> None:
    def value(first: int) -> bytes:
        buckets = range(first, first + types.enums["buckets"]["BUCKETS"])
        packed = struct.pack(f"={len(buckets)}Q", *buckets)
        return types.pack(
            "quality", rtt=packed, rtt_sum=first * 1_000_000, duration=packed, duration_sum=first * 2_000_000,
            retransmitted=first + 3, segments_out=first + 4, segments_in=first + 5,
        )  # fmt: skip

    key = types.pack("quality_key", pod=BIG, direction=1)
    counts = tuple(range(5, 5 + len(RTT_BOUNDS) + 1))
    assert account_abi.quality(key, value(5), None) == Quality(
        pod=BIG,
        direction=Direction.INBOUND,
        rtt=counts,
        rtt_sum=5.0,
        duration=counts,
        duration_sum=10.0,
        retransmitted=8,
        segments_out=9,
        segments_in=10,
    )
    ones = (1,) * len(counts)
    assert account_abi.quality(key, value(6), value(5)) == Quality(
        pod=BIG,
        direction=Direction.INBOUND,
        rtt=ones,
        rtt_sum=1.0,
        duration=ones,
        duration_sum=2.0,
        retransmitted=1,
        segments_out=1,
        segments_in=1,
    )
    assert types.enums["buckets"] == {"BOUNDS": len(RTT_BOUNDS), "BUCKETS": len(DURATION_BOUNDS) + 1}


def check_shares(types: Types) -> None:
    key = types.pack("share_key", pod=BIG, of=1)
    assert account_abi.share_key(BIG, Shared.HANDSHAKES) == key and account_abi.shared(key) == (BIG, Shared.HANDSHAKES)
    value = types.pack("share", taken=BIG, refused=7)
    assert account_abi.share(value) == Share(BIG, 7) and Share(BIG, 7).encode() == value
    for name in ("tally_key", "handshake"):
        assert types.structs[name][1]["pod"] == (0, 8)
    assert account_abi.owner(types.pack("handshake", pod=BIG, client=1, server=2)) == BIG


def check_destinations(types: Types) -> None:
    key = types.pack("destination", pod=BIG, address=address(ip_address(REMOTE)), port=b"\x12\x34")
    assert (account_abi.owner(key), account_abi.destination(key)) == (BIG, (REMOTE, 0x1234))
    assert account_abi.refused(types.pack("returns", first=BIG, refused=BIG + 1, count=8)) == BIG + 1


def check_enums(types: Types) -> None:
    enums: tuple[tuple[str, str, type[IntEnum]], ...] = (
        ("fate", "FATE_", Fate),
        ("reason", "REASON_", Reason),
        ("how", "HOW_", How),
        ("closer", "CLOSER_", Closer),
        ("loss", "LOST_", Loss),
        ("shared", "SHARE_", Shared),
    )
    for name, start, found in enums:
        members = dict(types.enums[name])
        if name == "loss":
            assert members.pop("LOSSES") == len(members)
        if name == "shared":
            assert members.pop("SHARES") == len(members)
        assert all(word.startswith(start) for word in members), name
        assert {word.removeprefix(start): value for word, value in members.items()} == {
            one.name: one.value for one in found
        }, name
    assert types.enums["owner"]["OWNER_ZTUNNEL"] == int.from_bytes(collector._ZTUNNEL, sys.byteorder)


@pytest.fixture(scope="module")
def types(tmp_path_factory: pytest.TempPathFactory) -> Types:
    return types_of(HEADER, tmp_path_factory.mktemp("abi"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Types:
    """What they have in common with the programs that capture."""
    return types_of(BPF / "abi.h", tmp_path_factory.mktemp("abi"))


@pytest.mark.parametrize(
    "part",
    [check_records, check_tallies, check_qualities, check_shares, check_destinations, check_enums],
    ids=lambda part: part.__name__,
)
def test_c_and_python_say_the_same(types: Types, part: Any) -> None:
    part(types)


@pytest.mark.parametrize(("name", "bounds"), [("rtt", RTT_BOUNDS), ("duration", DURATION_BOUNDS)])
def test_the_buckets_have_the_same_bounds(name: str, bounds: tuple[float, ...]) -> None:
    """In microseconds, as the source has them."""
    (listed,) = re.findall(rf"\b{name}_bounds\[BOUNDS\] = \{{(.*?)\}}", (BPF / "accounting.h").read_text(), re.DOTALL)
    assert [int(one) for one in listed.split(",")] == [round(bound * 1e6) for bound in bounds]


@pytest.mark.parametrize("name", OBJECTS)
def test_what_the_programs_were_built_with_are_those_headers(types: Types, shared: Types, name: str) -> None:
    found, wanted = types_in(object_files.path(name)).structs, {**shared.structs, **types.structs}
    mine = found.keys() & wanted.keys()
    assert ({"pod"} if name == object_files.RESERVE[0].object else {"record", "account", "tally", "pod"}) <= mine
    assert {each: found[each] for each in mine} == {each: wanted[each] for each in mine}


def test_no_struct_has_padding_that_nobody_names(types: Types) -> None:
    for name, (whole, layout) in types.structs.items():
        assert sum(room for _, room in layout.values()) == whole, name


# Map -> struct of its key, and of its value; or their sizes.
MAPS: dict[str, tuple[str | int, str | int]] = {
    "pods": (8, "pod"),
    "policies": ("policy_key", "policy_value"),
    "exits": (4, 8),
    "ztunnels": ("ztunnel", 4),
    "memories": (4, "memory"),
    "accounts": (4, "account"),
    "owners": (4, 4),
    "chosen": (4, 8),
    "begun": ("handshake", "begun"),
    "spoken": ("handshake", 4),
    "onward": ("handshake", "destination"),
    "returns": ("destination", "returns"),
    "late": ("handshake", "record"),
    "tallies": ("tally_key", "tally"),
    "shares": ("share_key", "share"),
    "rest": ("tally_key", "tally"),
    "exported": ("tally_key", "tally"),
    "former": ("tally_key", "tally"),
    "qualities": ("quality_key", "quality"),
    "records": (0, 0),
    "losses": (4, 8),
    "crafted": ("flow", 4),
}


def test_every_object_passes_the_verifier_and_its_maps_have_those_sizes(
    tmp_path: Path, types: Types, shared: Types
) -> None:
    structs = {**shared.structs, **types.structs}
    with bpf_node(tmp_path) as node:
        for name in OBJECTS:
            wanted = tuple(one.name for one in object_files.ACCOUNTING if one.object == name)
            constants = struct.pack("=Q", 7) if name == object_files.WATCH.object else b""
            try:
                loaded = load.load(object_files.path(name), node.maps, lambda each: node.program(each), {}, constants)
            except KernelError as error:
                # A hardened kernel refuses iterators over a map, before it verifies them: `files` is for it.
                assert (name, error.errno) == (object_files.REFRESH.object, errno.EPERM)
                continue
            assert sorted(loaded) == sorted(wanted)
        assert {path.name for path in node.maps.iterdir()} == {*MAPS}
        for name, pair in MAPS.items():
            sizes = tuple(structs[one][0] if isinstance(one, str) else one for one in pair)
            with Map.open(node.maps / name) as found:
                assert (found.key_size, found.value_size) == sizes, name
                if name == "losses":
                    assert found.max_entries == len(Loss)


# What the agent neither reads nor writes: only the programs do, among themselves.
INSIDE = ("enum reported", "enum owner", "struct handshake", "struct account", "struct begun")


@pytest.mark.slow
def test_every_change_of_the_header_is_noticed(tmp_path: Path) -> None:
    """But of what stays among the programs, and of padding, which a test above counts."""
    missed, tried = [], 0
    for what, header in mutations(HEADER, INSIDE):
        place = tmp_path / str(tried)
        place.mkdir()
        (place / "account.h").write_text(header)
        tried += 1
        try:
            check(types_of(place / "account.h", place))
        except (AssertionError, CommandError, KeyError, ValueError, struct.error, OverflowError):
            continue  # that it does not compile is noticed, too
        missed.append(what)
    assert missed == [] and tried > 140
