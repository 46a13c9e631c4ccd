# SPDX-License-Identifier: Apache-2.0
"""Namespaces by the thousand for the benchmarks of rules: held by a descriptor, gone with this process."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from agent.kernel import scratch
from agent.kernel.netns import Netns
from agent.kernel.pod_netns import PodNetns
from agent.lab.links import links


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Netns]]:
    """With lo and an eth0 that have addresses, on no network: nothing is sent here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    made: list[Netns] = []
    try:
        for number in range(count):
            made.append(_made(number))
        yield made
    finally:
        for one in made:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _made(number: int) -> Netns:
    fd = scratch.call(lambda: os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
    inside = Netns(fd, f"slu-bench-{number}")
    high, low = divmod(number, 250)
    with links(f"/proc/self/fd/{inside.fd}") as within:
        within.up("lo")
        within.veth("eth0", "eth1")
        within.up("eth1")
        within.add_addresses("eth0", f"10.98.{high}.{low + 1}/16", f"fd98::{number + 1:x}/64")
    return inside


@contextlib.contextmanager
def held(inside: list[Netns]) -> Iterator[list[PodNetns]]:
    """As an agent holds pods that it has just met: sockets open, nothing known. The namespaces stay."""
    targets = [PodNetns(Netns(os.dup(one.fd), one.origin)) for one in inside]
    try:
        for target in targets:
            target.nft.generation()
        yield targets
    finally:
        with ThreadPoolExecutor(8) as pool:  # closing an nf_tables socket waits, so several at a time
            list(pool.map(PodNetns.close, targets))
