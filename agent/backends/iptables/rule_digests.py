# SPDX-License-Identifier: Apache-2.0
"""Digests of rules, learned from what the kernel held just after they were applied. No IO.

A tag names a rule and all before it, so under the same tags a chain must hold the same bytes for ever. A rule with
the right tag and other bytes was put there by another program: it is shown without its tag, and so is drift. Chains
that this process never applied (a predecessor did) are taken by their tags alone.
"""

from __future__ import annotations

from dataclasses import replace

from agent.backends.iptables.legacy_reading import LegacyTable
from agent.backends.iptables.rendering import XtTable

_KEPT = 1024  # chains; a node's variants have some ten each


class RuleDigests:
    """Digests of whole chains by their tags; several per chain, should bytes depend on the namespace."""

    def __init__(self) -> None:
        self._learned: dict[tuple[str, ...], set[tuple[bytes, ...]]] = {}
        self.version = 0  # of what is known; it never comes back

    def learn(self, held: LegacyTable) -> None:
        for (_, tags), digests in zip(held.table.chains, held.digests, strict=True):
            if len(self._learned) >= _KEPT and tags not in self._learned:
                self._learned.clear()  # tags alone have to do until the next change
            if digests not in self._learned.setdefault(tags, set()):
                self._learned[tags].add(digests)
                self.version += 1

    def verified(self, held: LegacyTable) -> XtTable:
        """Returns the table, with "" for the tag of each rule that does what was never learned of it."""
        pairs = list(zip(held.table.chains, held.digests, strict=True))
        if all(digests in self._learned.get(tags, (digests,)) for (_, tags), digests in pairs):
            return held.table
        return replace(held.table, chains=tuple((name, self._tags(tags, digests)) for (name, tags), digests in pairs))

    def _tags(self, tags: tuple[str, ...], digests: tuple[bytes, ...]) -> tuple[str, ...]:
        learned = self._learned.get(tags, {digests})
        if digests in learned:
            return tags
        allowed = [set(column) for column in zip(*learned, strict=True)]
        kept = tuple(tag if digest in good else "" for tag, digest, good in zip(tags, digests, allowed, strict=True))
        return kept if kept != tags else ("",) * len(tags)
