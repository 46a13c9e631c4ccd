# SPDX-License-Identifier: Apache-2.0
"""Summaries of a pod's latest DNS queries, and totals of all queries by type and code. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from agent.core.wire.dns_message import code_word, type_word
from agent.flows.dns.queries import NO_ANSWER, DnsQuery

BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)  # seconds
_TYPES: Final = frozenset(word for word in map(type_word, range(256)) if not word.startswith("TYPE"))
_CODES: Final = frozenset(word for word in map(code_word, range(16)) if not word.startswith("RCODE")) | {NO_ANSWER}


class DnsTotals:
    """Counts of all pods' queries. The labels are bounded: other types and codes are "other"."""

    def __init__(self) -> None:
        self.counts = Counter[tuple[str, str, bool]]()  # type, code, captured
        self.buckets = {captured: [0] * (len(BOUNDS) + 1) for captured in (False, True)}  # one more: longer ones
        self.sums = {False: 0.0, True: 0.0}

    def add(self, query: DnsQuery) -> None:
        kind = query.type if query.type in _TYPES else "other"
        self.counts[kind, query.code if query.code in _CODES else "other", query.captured] += 1
        if query.seconds is not None:
            self.buckets[query.captured][bisect_left(BOUNDS, query.seconds)] += 1
            self.sums[query.captured] += query.seconds


def summary(queries: Sequence[DnsQuery], lost: int = 0) -> dict[str, Any]:
    """Summarises queries of one pod. `search`: those for names that do not exist and that a search list made.

    `silent` counts the queries that a resolver seems not to have answered, by resolver, "" for an unknown one.
    """
    codes = Counter(query.code for query in queries)
    silent = Counter(query.resolver for query in queries if query.silent)
    taken = sorted(query.seconds for query in queries if query.seconds is not None)
    return {
        "queries": len(queries),
        "rcodes": dict(codes.most_common()),
        "no_answer": codes[NO_ANSWER],
        "silent": dict(silent.most_common()),
        "search": _of_search_list(queries),
        "around": sum(not query.captured for query in queries),
        "median_seconds": round(taken[len(taken) // 2], 6) if taken else None,
        "resolvers": sorted({query.resolver for query in queries if query.resolver}),
        "lost": lost,
    }


def _of_search_list(queries: Iterable[DnsQuery]) -> int:
    """Counts names that do not exist and are another asked name with a domain behind it, as `www.example.com.svc`."""
    names = {query.name.lower() for query in queries if query.code != "NXDOMAIN"}
    absent = (query.name.lower().split(".") for query in queries if query.code == "NXDOMAIN")
    return sum(any(".".join(name[:end]) in names for end in range(1, len(name))) for name in absent)
