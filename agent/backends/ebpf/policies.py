# SPDX-License-Identifier: Apache-2.0
"""Entries of pods' policies in map `policies`: of the programs that capture, and of those that account."""

from __future__ import annotations

from collections.abc import Iterable

from agent.backends.ebpf import abi
from agent.backends.ebpf.abi import Prefix
from agent.kernel.bpf.map_reuse import Maps


def put(maps: Maps, policy: int, prefixes: Iterable[Prefix]) -> None:
    """Raises KernelError."""
    for one in prefixes:
        maps["policies"].update(one.key(policy), one.encode())


def drop(maps: Maps, policy: int) -> None:
    """All that it lists. Raises KernelError."""
    policies = maps["policies"]
    for key, value in policies.items():
        if abi.prefix(key, value)[0] == policy:
            policies.delete(key)
