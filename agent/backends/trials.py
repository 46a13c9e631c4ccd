# SPDX-License-Identifier: Apache-2.0
"""Tries on this node's kernel what the choice of a backend asks for, and keeps the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

from agent.backends import kernel_features
from agent.backends.base import PodLayer, Support
from agent.backends.choose import LAYERS, Trials
from agent.backends.kernel_features import Feature
from agent.backends.registry import mechanisms
from agent.backends.selftest import selftest_choice

if TYPE_CHECKING:
    from agent.backends.ebpf.pins import Pins
    from agent.backends.ebpf.ztunnels import Ztunnels


class KernelTrials:
    """Trials of layers. `support` has their results by layer, `findings` those of self-tests by choice."""

    def __init__(
        self,
        pins: Pins,
        *,
        ipv6: bool,
        ztunnels: Ztunnels | None = None,
        sizes: Mapping[str, int] = MappingProxyType({}),
        made: Mapping[str, PodLayer] = MappingProxyType({}),
    ) -> None:
        """Makes the layers that `made` lacks."""
        self.backends = {**mechanisms(ipv6=ipv6, pins=pins, ztunnels=ztunnels, sizes=sizes), **made}
        self.support: dict[str, Support] = {}
        self.findings: dict[str, tuple[str, ...]] = {}
        self._pins = pins
        self._ipv6 = ipv6

    @property
    def trials(self) -> Trials:
        return Trials(self.probe, self.test, lambda choice: kernel_features.lacking(self.features(choice)))

    def probe(self, layer: str) -> Support:
        self.support[layer] = self.backends[layer].probe()
        return self.support[layer]

    def test(self, layers: Sequence[PodLayer]) -> tuple[str, ...]:
        name = next(name for name, members in LAYERS.items() if members[-1] == layers[-1].name)
        self.findings[name] = selftest_choice(layers, self._pins, ipv6=self._ipv6)
        return self.findings[name]

    def features(self, choice: str) -> tuple[Feature, ...]:
        """Tries every need of the choice. Loads modules as programming a pod would."""
        attempt = partial(kernel_features.attempt, bpf_dir=str(self._pins.root))
        return kernel_features.examine(choice, ipv6=self._ipv6, attempt=attempt)
