# SPDX-License-Identifier: Apache-2.0
"""How a taint is written, and the patches."""

from __future__ import annotations

import pytest

from agent.core.errors import SettingsError
from agent.sources.kube.node_taints import Taint, addition, removal


def test_p05_taints_as_kubectl_writes_them() -> None:
    """Key alone means NoSchedule."""
    assert Taint.parse("sluice.io/not-ready") == Taint("sluice.io/not-ready", "", "NoSchedule")
    assert Taint.parse("a/b=c:NoExecute") == Taint("a/b", "c", "NoExecute")
    assert str(Taint.parse("a=:PreferNoSchedule")) == "a:PreferNoSchedule"
    for text in ("", "a b", "a:Never", ":NoSchedule", "=x:NoSchedule", "a:", "a\n"):
        with pytest.raises(SettingsError):
            Taint.parse(text)


def test_p05_every_step_is_guarded() -> None:
    """A removal tests each entry before it goes; from the end, so that places stay right."""
    ours = {"key": "a", "effect": "NoSchedule"}
    node = {"spec": {"taints": [ours, {"key": "b", "effect": "NoSchedule"}, {**ours, "value": "x"}]}}
    assert removal(node, Taint("a")) == [
        {"op": "test", "path": "/spec/taints/2", "value": {**ours, "value": "x"}},
        {"op": "remove", "path": "/spec/taints/2"},
        {"op": "test", "path": "/spec/taints/0", "value": ours},
        {"op": "remove", "path": "/spec/taints/0"},
    ]
    assert addition(node, Taint("a")) == [] and removal({"spec": {}}, Taint("a")) == []
    assert addition(node, Taint("c"))[0] == {"op": "test", "path": "/spec/taints", "value": node["spec"]["taints"]}
    bare = {"metadata": {"resourceVersion": "9"}, "spec": {}}
    assert addition(bare, Taint("c"))[0] == {"op": "test", "path": "/metadata/resourceVersion", "value": "9"}
    assert removal({"spec": {"taints": "odd"}}, Taint("a")) == [] == removal({}, Taint("a"))
