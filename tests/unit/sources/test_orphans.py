# SPDX-License-Identifier: Apache-2.0
"""A pod of which nothing is found is awaited while Kubernetes has it, and gone when Kubernetes has it no more."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from pathlib import Path

import pytest

from agent.core.errors import NetnsError, PodGoneError
from agent.core.model.pods import Pod
from agent.kernel.netns import Netns
from agent.sources.netns.batcher import SearchBatcher
from agent.sources.netns.namespace_registry import NamespaceRegistry
from agent.sources.state.notes import Notes

POD = Pod("u1", "shop", "web", source="kube")


class Nothing(SearchBatcher):
    def __init__(self) -> None:
        super().__init__(tuple)

    def find(self, pod: Pod, known: Container[str]) -> Netns:
        raise NetnsError("nothing of it is here")


def test_a_pod_that_is_not_found(tmp_path: Path) -> None:
    namespaces = NamespaceRegistry(Notes(str(tmp_path)))
    namespaces.unannounced = Nothing()
    with pytest.raises(NetnsError, match="nothing of it is here") as found:
        namespaces.resolve(POD)
    assert type(found.value) is NetnsError
    with pytest.raises(PodGoneError):
        namespaces.resolve(replace(POD, orphan=True))
