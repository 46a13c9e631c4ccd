# SPDX-License-Identifier: Apache-2.0
"""The form in which both sides are compared: the tables of one pod, desired or read, rules as digests. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from hashlib import blake2b

from agent.core.wire import nftables as wire
from agent.core.wire.netlink import attributes, unpack_text

# Of each expression only the attributes that we set are compared: a newer kernel may dump more of them,
# and counters run. Values of the inner ones are flattened, since the kernel and we may differ in flag bits.
_COMPARED: dict[str, frozenset[int]] = {
    "meta": frozenset(wire.Meta),
    "cmp": frozenset(wire.Cmp),
    "payload": frozenset(wire.Payload),
    "bitwise": frozenset(wire.Bitwise),
    "immediate": frozenset(wire.Immediate),
    "redir": frozenset(wire.Redir),
    "ct": frozenset(wire.Ct),
    "byteorder": frozenset(wire.Byteorder),
    "lookup": frozenset({wire.Lookup.SREG}),  # the set's name and number are the kernel's
    "counter": frozenset(),
}
_NESTED = {
    ("cmp", wire.Cmp.DATA),
    ("bitwise", wire.Bitwise.MASK),
    ("bitwise", wire.Bitwise.XOR),
    ("immediate", wire.Immediate.DATA),
}


@dataclass(frozen=True, slots=True)
class Chain:
    """`kind`, `hook` and `priority` are empty for a regular chain. Rules are (tag or "", digest) in order."""

    name: str
    rules: tuple[tuple[str, str], ...]
    _: KW_ONLY
    kind: str = ""
    hook: int = -1
    priority: int = 0
    accepts: bool = True


@dataclass(frozen=True, slots=True)
class TableState:
    """One of Sluice's tables. `flags` and `owner` (netlink port, 0: unowned) are set when it was read."""

    name: str
    chains: tuple[Chain, ...]  # by name
    flags: int = 0
    owner: int = 0


def differences(want: tuple[TableState, ...], have: tuple[TableState, ...]) -> Iterator[str]:
    """Yields the differences in words, table by table; ownership is ignored."""
    wanted, actual = {t.name: t for t in want}, {t.name: t for t in have}
    for name in sorted({*wanted, *actual}):
        if name not in actual:
            yield f"table inet {name} is missing"
        elif name not in wanted:
            yield f"table inet {name} is not wanted"
        elif wanted[name].chains != actual[name].chains:
            yield from _chains(name, wanted[name], actual[name])


def _chains(table: str, want: TableState, have: TableState) -> Iterator[str]:
    wanted, actual = {c.name: c for c in want.chains}, {c.name: c for c in have.chains}
    for name in sorted({*wanted, *actual}):
        prefix = f"chain {table} {name}"
        if name not in actual:
            yield f"{prefix} is missing"
        elif name not in wanted:
            yield f"{prefix} is not ours"
        elif wanted[name].rules != actual[name].rules:
            yield f"{prefix}: {rule_difference(wanted[name].rules, actual[name].rules)}"
        elif wanted[name] != actual[name]:
            yield f"{prefix} has another hook, priority, type or policy"


def rule_difference(want: tuple[tuple[str, str], ...], have: tuple[tuple[str, str], ...]) -> str:
    """Describes how a list of rules differs from the desired one, in one clause."""
    tags = {tag for tag, _ in have}
    missing = [index for index, (tag, _) in enumerate(want, 1) if tag not in tags]
    own = {tag for tag, _ in want}
    foreign = sum(tag not in own for tag, _ in have)
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(want)} rules missing")
    if foreign:
        parts.append(f"{foreign} rules that are not wanted")
    return ", ".join(parts) or "rules altered or in another order"


def digest(expressions: bytes) -> str:
    """Returns a hash of what a rule does, from NFTA_RULE_EXPRESSIONS; equal for what we send and the kernel dumps."""
    state = blake2b(digest_size=8)
    for _, element in attributes(expressions):
        parts = dict(attributes(element))
        name = unpack_text(parts.get(wire.Expr.NAME))
        state.update(f"\n{name}".encode())
        compared = _COMPARED.get(name)
        for kind, payload in sorted(attributes(parts.get(wire.Expr.DATA, b""))):
            if compared is None or kind in compared:
                state.update(b"%d=" % kind + (_flat(payload) if (name, kind) in _NESTED else payload))
    return state.hexdigest()


def _flat(data: bytes) -> bytes:
    parts = []
    for kind, payload in sorted(attributes(data)):
        # A verdict is one level deeper; NFTA_DATA_VALUE is the value itself.
        deeper = kind == wire.Data.VERDICT
        inner = b"".join(b"%d:" % k + v for k, v in sorted(attributes(payload))) if deeper else payload
        parts.append(b"%d(" % kind + inner + b")")
    return b"".join(parts)
