# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes stand for a table of legacy xtables, reading them ends in tags or in a KernelError."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from agent.backends.iptables.legacy_reading import read_table
from agent.backends.iptables.rendering import render, script
from agent.backends.iptables.rule_digests import RuleDigests
from agent.core.errors import KernelError
from agent.core.model.redirect import Redirect

REAL = json.loads((Path(__file__).parents[1] / "unit/backends/data/legacy_tables.json").read_text())["tables"]
TABLES = {
    (int(family), name): (base64.b64decode(info), zlib.decompress(base64.b64decode(data)))
    for family, tables in REAL.items()
    for name, (info, data) in tables.items()
}
# What a script may say besides our own fixed text.
LINE = re.compile(
    r"\*(raw|mangle|nat)|COMMIT|:ISTIO_(OUTPUT|PRERT) - \[0:0\]|-[FX] ISTIO_(OUTPUT|PRERT)"
    r'|-D [A-Za-z0-9_.-]+ (-m comment --comment "sluice:[0-9a-f]{12}" )?-j ISTIO_(OUTPUT|PRERT)'
)


def check(family: int, info: bytes, data: bytes) -> None:
    try:
        table = read_table(family, info, data)
    except KernelError:
        return
    assert len(table.digests) == len(table.table.chains)
    assert table.holds(data)
    digests = RuleDigests()
    digests.learn(table)
    assert digests.verified(table) == table.table
    name = info[:32].split(b"\0")[0].decode(errors="replace")
    nothing = render(Redirect(ipv4=False, ipv6=False), family)
    for line in script(nothing, {name: table.table}).splitlines():
        assert LINE.fullmatch(line), line


@given(st.sampled_from([4, 6]), st.binary(max_size=100), st.binary(max_size=400))
def test_any_bytes(family: int, info: bytes, data: bytes) -> None:
    """Never anything but a table or a KernelError."""
    check(family, info, data)
    sized = info[:80].ljust(80, b"\0") + struct.pack("=I", len(data))
    check(family, sized, data)


@given(
    st.sampled_from(sorted(TABLES)),
    st.lists(st.tuples(st.integers(0, 8000), st.binary(min_size=1, max_size=8)), max_size=6),
    st.lists(st.tuples(st.integers(0, 83), st.binary(min_size=1, max_size=4)), max_size=2),
)
def test_any_damage_to_real_tables(
    which: tuple[int, str], damage: list[tuple[int, bytes]], info_damage: list[tuple[int, bytes]]
) -> None:
    """Nor does any byte of a table get into a script but in names and tags of our form."""
    info, data = TABLES[which]
    check(which[0], _with(info, info_damage), _with(data, damage))


@given(st.sampled_from(sorted(TABLES)), st.integers(0, 30), st.integers(0, 65535), st.integers(0, 65535))
def test_any_lengths_in_real_tables(which: tuple[int, str], number: int, target: int, following: int) -> None:
    """Lengths inside an entry lead nowhere outside of it."""
    info, data = TABLES[which]
    sizes = {4: 88, 6: 140}[which[0]]
    place = 0
    for _ in range(number):
        (step,) = struct.unpack_from("=H", data, place + sizes + 2)
        place = place + step if place + step < len(data) else 0
    check(which[0], info, _with(data, [(place + sizes, struct.pack("=HH", target, following))]))


@given(st.sampled_from(sorted(TABLES)), st.text(max_size=29), st.sampled_from([b"OTHER", b"sluice:", b"ISTIO_OUTPUT"]))
def test_any_text_where_names_and_comments_are(which: tuple[int, str], text: str, where: bytes) -> None:
    """Names of chains and comments are what a pod can choose freely."""
    info, data = TABLES[which]
    place = data.find(where)
    check(which[0], info, _with(data, [(max(place, 0), text.encode()[:29])]))


def _with(data: bytes, damage: list[tuple[int, bytes]]) -> bytes:
    changed = bytearray(data)
    for place, what in damage:
        if place < len(changed):
            changed[place : place + len(what)] = what[: len(changed) - place]
    return bytes(changed)
