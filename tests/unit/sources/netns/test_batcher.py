# SPDX-License-Identifier: Apache-2.0
"""One search serves all pods that wait for one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from agent.core.errors import NetnsError
from agent.core.model.pods import Pod
from agent.sources.netns import batcher
from agent.sources.netns.batcher import SearchBatcher


def test_pods_with_a_known_namespace_are_not_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[list[str]] = []

    def search(pods: Sequence[Pod]) -> dict[str, NetnsError]:
        searched.append([pod.uid for pod in pods])
        return {"u1": NetnsError("nothing of it is here")}

    monkeypatch.setattr(batcher, "search", search)
    pods = [Pod(uid, "shop", uid) for uid in ("u1", "u2", "u3")]
    made = SearchBatcher(lambda: pods)
    with pytest.raises(NetnsError, match="nothing of it is here"):
        made.find(pods[0], {"u2": "open"}.keys())
    assert searched == [["u1", "u3"]]
