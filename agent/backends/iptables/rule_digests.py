"""Digests of rules, learned from what the kernel held just after they were applied. No IO.

A tag names a rule and all before it, so under the same tags a chain must hold the same bytes for ever. A rule with
the right tag and other bytes was put there by another program: it is shown without its tag, and so is drift. Chains
that this process never applied (a predecessor did) are taken by their tags alone.
"""

from __future__ import annotations

from dataclasses import replace

from agent.backends.iptables.legacy_reading import Found
from agent.backends.iptables.rendering import XtTable

_KEPT = 1024  # chains; a node's variants have some ten each


class Deeds:
    """Digests of whole chains by their tags; several per chain, should bytes depend on the namespace."""

    def __init__(self) -> None:
        self._learned: dict[tuple[str, ...], set[tuple[bytes, ...]]] = {}
        self.version = 0  # of what is known; it never comes back

    def learn(self, found: Found) -> None:
        for (_, tags), deeds in zip(found.table.chains, found.deeds, strict=True):
            if len(self._learned) >= _KEPT and tags not in self._learned:
                self._learned.clear()  # tags alone have to do until the next change
            if deeds not in self._learned.setdefault(tags, set()):
                self._learned[tags].add(deeds)
                self.version += 1

    def judged(self, found: Found) -> XtTable:
        """The table, with "" for the tag of each rule that does what was never learned of it."""
        pairs = list(zip(found.table.chains, found.deeds, strict=True))
        if all(deeds in self._learned.get(tags, (deeds,)) for (_, tags), deeds in pairs):
            return found.table
        return replace(found.table, chains=tuple((name, self._tags(tags, deeds)) for (name, tags), deeds in pairs))

    def _tags(self, tags: tuple[str, ...], deeds: tuple[bytes, ...]) -> tuple[str, ...]:
        learned = self._learned.get(tags, {deeds})
        if deeds in learned:
            return tags
        allowed = [set(column) for column in zip(*learned, strict=True)]
        kept = tuple(tag if deed in good else "" for tag, deed, good in zip(tags, deeds, allowed, strict=True))
        return kept if kept != tags else ("",) * len(tags)
