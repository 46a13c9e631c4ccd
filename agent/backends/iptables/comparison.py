# SPDX-License-Identifier: Apache-2.0
"""Differences between desired and actual rules, in words, for both variants of iptables. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from agent.backends.iptables.bases import WORD
from agent.backends.iptables.reading import TABLES
from agent.backends.iptables.rendering import XtTable
from agent.core.errors import KernelError

_NONE = XtTable()


def refuse_taken(have: Mapping[str, XtTable]) -> None:
    """Raises KernelError if foreign chains have our names, in one family."""
    for table, held in have.items():
        if held.taken:
            cause = f"chain {held.taken[0]} of table {table} is foreign (as a sidecar's): it leads to foreign chains"
            raise KernelError("iptables-restore", 0, f"{cause}; exclude the pod from capture, or take these rules out")


def same(want: Mapping[str, XtTable], have: Mapping[str, XtTable]) -> bool:
    """True if there are no differences: the case that has to be quick."""
    return all(
        (left := want.get(table, _NONE)).chains == (right := have.get(table, _NONE)).chains
        and left.jumps == right.jumps
        for table in TABLES
    )


def differences(family: int, want: Mapping[str, XtTable], have: Mapping[str, XtTable]) -> Iterator[str]:
    """Yields one line per chain or set of jumps of one family (4, 6) that differs; both mappings by table name."""
    for table in TABLES:
        wanted = want.get(table, _NONE)
        actual = have.get(table, _NONE)
        prefix = f"{WORD[family]}tables -t {table}"
        left, right = dict(wanted.chains), dict(actual.chains)
        if left and not right and not actual.jumps:
            yield f"{prefix}: Sluice's chains are missing"
            continue
        for chain in sorted({*left, *right}):
            if chain not in right:
                yield f"{prefix}: chain {chain} is missing"
            elif chain not in left:
                yield f"{prefix}: chain {chain} is not wanted"
            elif left[chain] != right[chain]:
                missing = len(set(left[chain]) - set(right[chain]))
                yield f"{prefix}: chain {chain} has {len(right[chain])} rules, {missing} of Sluice's are missing"
        if wanted.jumps != actual.jumps:
            yield f"{prefix}: {len(actual.jumps)} jumps into Sluice's chains, not the {len(wanted.jumps)} wanted"
