# SPDX-License-Identifier: Apache-2.0
"""Which cookies belong to nobody any more: of no pod that is known, and of no namespace that lives."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.rules import pod as made

from agent.core.model.pods import Pod
from agent.kernel.netns import NetnsId, unpin
from agent.lab.links import remove_namespace
from agent.sources.netns.namespace_registry import NamespaceRegistry
from agent.sources.state.notes import Note, Notes

pytestmark = pytest.mark.root
NOBODYS = 2**63


def test_only_what_is_known_by_nobody_and_does_not_live_is_dead(tmp_path: Path) -> None:
    held = NamespaceRegistry(Notes(str(tmp_path)))
    held.restore(Note(Pod("u-1", "shop", "web"), captured=True, netns=NetnsId(1, 2, NOBODYS + 1)))
    with made("slu-tt-dead") as one, made("slu-tt-gone") as other:
        cookie, gone = one.target.netns.id.cookie, other.target.netns.id.cookie
        assert held.dead([NOBODYS, NOBODYS + 1, cookie]) == {NOBODYS}, "one is noted, one lives"
        pin = tmp_path / "netns" / "u-2"  # as of a pod whose note was damaged
        other.target.netns.pin(pin)
        remove_namespace(other.name)
        try:
            assert held.dead([gone]) == frozenset()
        finally:
            unpin(pin)
        other.target.close()
        assert held.dead([gone, cookie]) == {gone}
        assert held.dead([cookie]) == held.dead([]) == frozenset()


def test_an_open_namespace_is_a_pods(tmp_path: Path) -> None:
    held = NamespaceRegistry(Notes(str(tmp_path)))
    with made("slu-tt-open") as one:
        known = held.resolve(Pod("u-1", "shop", "web", netns_path=str(one.path)))
        cookie = known.netns.id.cookie
        assert held.opened("u-1") is known and held.opened("u-2") is None and held.dead([cookie]) == frozenset()
        remove_namespace(one.name)
        one.target.close()
        assert held.dead([cookie]) == frozenset(), "until it is released"
        held.release("u-1")
        assert held.dead([cookie]) == {cookie}
