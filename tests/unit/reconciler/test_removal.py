# SPDX-License-Identifier: Apache-2.0
"""What the node itself holds goes at the end of an uninstallation."""

from __future__ import annotations

from typing import Any, cast

from support.fakekernel import Backend as Fake
from support.fakekernel import Kernel, Lasting, Target

from agent.core.errors import KernelError
from agent.core.model.redirect import Redirect
from agent.reconciler.removal import REMAINS, REMOVED, WOULD, uncapture_left


def world() -> tuple[Kernel, list[Any]]:
    kernel = Kernel()
    layers = [Fake("rules", kernel), Lasting("programs", kernel), Lasting("entries", kernel)]
    for layer in layers:
        kernel.held[layer.name, Target(layer.name)] = Redirect()
    return kernel, cast("list[Any]", layers)


def test_what_outlives_its_pods_goes_backwards_and_nothing_else() -> None:
    kernel, layers = world()
    found = uncapture_left(layers, dry_run=True)
    assert found and (found.result, found.layers) == (WOULD, ("entries", "programs")) and kernel.log == []
    found = uncapture_left(layers)
    assert found and (found.result, found.errors) == (REMOVED, ())
    assert kernel.log == ["entries clear entries", "programs clear programs"]
    assert [name for name, _ in kernel.held] == ["rules"] and uncapture_left(layers) is None


def test_what_cannot_be_removed_is_told_and_stops_nothing_else() -> None:
    kernel, layers = world()
    layers[2].failures = [KernelError("map pods", 1, "Operation not permitted")]
    found = uncapture_left(layers)
    assert found and found.result == REMAINS and "entries: map pods: Operation not permitted" in found.errors[0]
    assert kernel.log == ["programs clear programs"]
