# SPDX-License-Identifier: Apache-2.0
"""Entries of a legacy xtables table: struct ipt_entry and ip6t_entry as a 64-bit kernel lays them out. Pure.

linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h, linux/netfilter/x_tables.h.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from agent.core.errors import KernelError

_PART = struct.Struct("=H29sB")  # xt_entry_match, xt_entry_target: size, name, revision; its data follow
_RETURN = -5  # XT_RETURN
_ERROR_NAME = 30  # XT_FUNCTION_MAXNAMELEN
_NO_COUNT = bytes(16)  # xt_counters


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """Offsets: flags with their goto bit, end of the addresses, sizes (two u16), counters, matches and target."""

    flags: int
    goto: int
    addresses: int
    sizes: int
    counters: int
    parts: int


_FORMS = {
    4: _Form(flags=82, goto=2, addresses=84, sizes=88, counters=96, parts=112),
    6: _Form(flags=131, goto=4, addresses=136, sizes=140, counters=152, parts=168),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class XtEntry:
    """`head` names the chain that begins after this entry, `jump` the chain that it jumps to.

    `plain` says that it takes every packet. `digest` covers all bytes but counters and offsets.
    """

    offset: int
    head: str | None
    jump: str | None
    plain: bool
    returns: bool
    comment: str | None
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Target:
    name: str
    verdict: int | None
    data: bytes


def broken(what: str) -> KernelError:
    return KernelError("read xtables", 0, f"{what} of the kernel's entries do not add up; is this a 64-bit kernel?")


def offsets(family: int, data: bytes) -> Iterator[int]:
    """Yields the offset of each entry. Raises KernelError."""
    form = _FORMS[family]
    offset = 0
    if not data:
        raise broken("lengths")
    while offset < len(data):
        if offset + form.parts > len(data):
            raise broken("lengths")
        target, size = struct.unpack_from("=HH", data, offset + form.sizes)
        if not form.parts <= target <= size - _PART.size or offset + size > len(data):
            raise broken("lengths")
        yield offset
        offset += size


def blanked(family: int, data: bytes, at: Sequence[int]) -> bytes:
    """Returns the same with zeros for the counters of the entries `at` these offsets."""
    counters = _FORMS[family].counters
    blank = bytearray(data)
    for offset in at:
        blank[offset + counters : offset + counters + 16] = _NO_COUNT
    return bytes(blank)


def counts(family: int, data: bytes, offset: int) -> tuple[int, int]:
    """Returns (packets, bytes) that the entry at this place has matched."""
    pair: tuple[int, int] = struct.unpack_from("=QQ", data, offset + _FORMS[family].counters)
    return pair


def without_counts(family: int, size: int, at: Sequence[int]) -> struct.Struct:
    """Takes `size` bytes of entries `at` these offsets apart into all that lies between the counters."""
    ends = [offset + _FORMS[family].counters for offset in at]
    begins = [0, *(end + len(_NO_COUNT) for end in ends)]
    parts = [f"{end - begin}s" for begin, end in zip(begins, (*ends, size), strict=True)]
    return struct.Struct("=" + f"{len(_NO_COUNT)}x".join(parts))


def entries(family: int, data: bytes, at: Sequence[int]) -> Iterator[XtEntry]:
    """Yields the entries `at` these offsets, which are all of the table's. Raises KernelError."""
    form = _FORMS[family]
    spans = list(zip(at, (*at[1:], len(data)), strict=True))
    targets = [_target(form, data[begin:end]) for begin, end in spans]
    # A jump leads to a chain's first rule, behind the chain's head.
    heads = {
        end: _text(target.data[:_ERROR_NAME])
        for (_, end), target in zip(spans, targets, strict=True)
        if target.name == "ERROR"
    }
    for (begin, end), target in zip(spans, targets, strict=True):
        yield _entry(form, begin, data[begin:end], target, heads, heads.get(end) if target.name == "ERROR" else None)


def _entry(
    form: _Form, begin: int, data: bytes, target: _Target, heads: Mapping[int, str], head: str | None
) -> XtEntry:
    (parts_end,) = struct.unpack_from("=H", data, form.sizes)
    matches = list(_parts(data[form.parts : parts_end]))
    comment = next((_text(body) for name, body in matches if name == "comment"), None)
    leads = target.verdict is not None and target.verdict >= 0
    jump = heads.get(target.verdict or 0) if leads else None
    hashed = data[: form.addresses] + data[form.parts : parts_end]
    hashed += f"jump {jump}".encode() if leads else data[parts_end:]
    plain = not any(data[: form.addresses]) and all(name == "comment" for name, _ in matches)
    returns = target.verdict == _RETURN
    return XtEntry(
        offset=begin,
        head=head,
        jump=jump,
        plain=plain,
        returns=returns,
        comment=comment,
        digest=blake2b(hashed, digest_size=16).digest(),
    )


def _target(form: _Form, data: bytes) -> _Target:
    (begin,) = struct.unpack_from("=H", data, form.sizes)
    name, body = next(_parts(data[begin:]))
    if name:
        return _Target(name, None, body)
    if len(body) < 4:
        raise broken("verdicts")
    return _Target(name, int.from_bytes(body[:4], sys.byteorder, signed=True), body)


def _parts(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields name and data of each match, or of the target."""
    offset = 0
    while offset < len(data):
        if offset + _PART.size > len(data):
            raise broken("parts")
        size, name, _ = _PART.unpack_from(data, offset)
        if size < _PART.size or offset + size > len(data):
            raise broken("parts")
        yield _text(name), data[offset + _PART.size : offset + size]
        offset += size


def _text(data: bytes) -> str:
    return data.split(b"\0")[0].decode(errors="replace")
