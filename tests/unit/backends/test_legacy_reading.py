# SPDX-License-Identifier: Apache-2.0
"""Bytes that a kernel handed out, read as iptables-legacy-save reads them; and what must never pass as ours."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from collections import Counter
from pathlib import Path

import pytest

from agent.backends.iptables.entries import blanked, offsets
from agent.backends.iptables.legacy_reading import LegacyTable, read_table
from agent.backends.iptables.rule_digests import RuleDigests
from agent.core.errors import KernelError

CAPTURED = json.loads((Path(__file__).parent / "data" / "legacy_tables.json").read_text())
ALL = [(int(family), name) for family, tables in CAPTURED["tables"].items() for name in tables]
COUNTERS = {4: 96, 6: 152}
OURS = ("ISTIO_OUTPUT", "ISTIO_PRERT")


def captured(family: int, name: str) -> tuple[bytes, bytes]:
    info, data = CAPTURED["tables"][str(family)][name]
    return base64.b64decode(info), zlib.decompress(base64.b64decode(data))


def read(family: int, name: str, old: bytes = b"", new: bytes = b"") -> LegacyTable:
    info, data = captured(family, name)
    assert old in data and len(old) == len(new)
    return read_table(family, info, data.replace(old, new, 1))


def shown(family: int, table: str) -> list[str]:
    """Lines of one table as iptables-legacy-save -c wrote them."""
    text = "\n".join(CAPTURED["save"][str(family)])
    return re.findall(rf"\*{table}\n(.*?)\nCOMMIT", text, re.DOTALL)[0].splitlines()


def rules(family: int, table: str, chain: str) -> list[str]:
    return [line for line in shown(family, table) if f" -A {chain} " in line]


@pytest.mark.parametrize(("family", "name"), ALL)
def test_what_is_read_is_what_iptables_shows(family: int, name: str) -> None:
    table = read(family, name).table
    assert [chain for chain, _ in table.chains] == list(OURS)
    for chain, tags in table.chains:
        assert list(tags) == [re.findall(r"sluice:\w+", line)[0] for line in rules(family, name, chain)]
    builtin = [line[1:].split()[0] for line in shown(family, name) if line.startswith(":") and "- [" not in line]
    assert list(table.bases) == sorted(builtin)
    jumps = [
        (base, "ISTIO_OUTPUT" if base == "OUTPUT" else "ISTIO_PRERT", re.findall(r"sluice:\w+", line)[0])
        for base in ("OUTPUT", "PREROUTING")
        for line in rules(family, name, base)
        if "sluice:" in line
    ]
    plain = [("OTHER", "ISTIO_OUTPUT", "")] if (family, name) == (4, "nat") else []
    assert list(table.jumps) == sorted(jumps + plain)


def test_a_jump_with_a_match_is_not_ours() -> None:
    assert any("--dport 4 -j ISTIO_OUTPUT" in line for line in shown(4, "nat"))
    assert len([jump for jump in read(4, "nat").table.jumps if jump[0] == "OUTPUT"]) == 1


@pytest.mark.parametrize(("family", "name"), ALL)
def test_counters_are_read_where_they_are_and_change_nothing(family: int, name: str) -> None:
    info, data = captured(family, name)
    at = tuple(offsets(family, data))
    packets = [struct.unpack_from("=Q", data, place + COUNTERS[family])[0] for place in at]
    told = [int(number) for number in re.findall(r"\[(\d+):", "\n".join(shown(family, name)))]
    assert Counter(told) <= Counter(packets), "the RETURN at a chain's end is counted too, but not shown"
    assert family == 6 or max(told) > 0
    counted = bytearray(data)
    for place in at:
        counted[place + COUNTERS[family] : place + COUNTERS[family] + 16] = b"\xff" * 16
    first, second = read_table(family, info, data), read_table(family, info, bytes(counted))
    assert first is second
    assert first.holds(data) and first.holds(bytes(counted))
    assert blanked(family, data, at) == blanked(family, bytes(counted), at)


@pytest.mark.parametrize(("family", "name"), ALL)
def test_no_other_byte_may_change_unseen(family: int, name: str) -> None:
    info, data = captured(family, name)
    known = read_table(family, info, data)
    counters = {place + COUNTERS[family] + n for place in offsets(family, data) for n in range(16)}
    for place in range(len(data)):
        other = bytearray(data)
        other[place] ^= 1
        assert known.holds(bytes(other)) == (place in counters), place
    assert not known.holds(data[:-1]) and not known.holds(data + b"\0") and not known.holds(b"")


TAG = b"sluice:87001975bd91"  # of the jump from OUTPUT in nat


@pytest.mark.parametrize("comment", [b'sluice:0" -j DROP;', b"sluice:0\n-F OUTPUT ", b"sluice:87001975bd9G", b"x" * 19])
def test_a_comment_of_another_form_is_somebody_elses(comment: bytes) -> None:
    old = next(jump for jump in read(4, "nat").table.jumps if jump[0] == "OUTPUT")
    assert old[2].encode() == TAG
    table = read(4, "nat", TAG, comment.ljust(19)[:19]).table
    assert [jump for jump in table.jumps if jump[0] == "OUTPUT"] == []
    inside = read(4, "nat").table.chains[0][1][0].encode()
    assert read(4, "nat", inside, comment.ljust(19)[:19]).table.chains[0][1][0] == ""


@pytest.mark.parametrize("name", [b"O\nHER", b"O HER", b"-THER", b'"THER', b"\xff\xfeHER"])
def test_a_chain_whose_name_does_not_fit_a_script_is_left_alone(name: bytes) -> None:
    assert ("OTHER", "ISTIO_OUTPUT", "") in read(4, "nat").table.jumps
    assert {base for base, _, _ in read(4, "nat", b"OTHER", name).table.jumps} == {"OUTPUT", "PREROUTING"}


def test_the_same_tag_on_another_deed_is_shown_without_its_tag() -> None:
    right = read(4, "nat")
    port = struct.pack(">HH", 15001, 15001)
    other = read(4, "nat", port, struct.pack(">HH", 15002, 15002))
    assert other.table == right.table, "tags alone do not tell"
    digests = RuleDigests()
    assert digests.verified(other) == other.table, "nothing was learned"
    digests.learn(right)
    assert digests.verified(right) is right.table
    tags, judged = dict(right.table.chains)["ISTIO_OUTPUT"], dict(digests.verified(other).chains)["ISTIO_OUTPUT"]
    assert judged == (*tags[:-1], "")
    digests.learn(other)
    assert digests.verified(other) == other.table, "what we applied ourselves is right"


@pytest.mark.parametrize("cut", [0, 1, 83])
def test_torn_bytes_are_refused(cut: int) -> None:
    info, data = captured(4, "nat")
    for torn in ((info[:cut], data), (info, data[:cut]), (info, data[:-cut]), (info[:-4] + bytes(4), b"")):
        with pytest.raises(KernelError, match="do not add up"):
            read_table(4, *torn)


def test_a_table_of_the_other_family_is_refused() -> None:
    with pytest.raises(KernelError, match="do not add up"):
        read_table(6, *captured(4, "nat"))
