# SPDX-License-Identifier: Apache-2.0
"""Namespaces by the thousand for the benchmarks of rules: held by a descriptor, gone with this process."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from agent.kernel import scratch
from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.kernel.pod_netns import PodNetns


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Netns]]:
    """With lo and an eth0 that have addresses, on no network: nothing is sent here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    made: list[Netns] = []
    try:
        for number in range(count):
            made.append(Netns(scratch.call(lambda number=number: _made(number)), f"slu-bench-{number}"))  # type: ignore[misc]
        yield made
    finally:
        for one in made:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _made(number: int) -> int:
    high, low = divmod(number, 250)
    commands = (
        "link set lo up",
        "link add eth0 type veth peer name eth1",
        f"address add 10.98.{high}.{low + 1}/16 dev eth0",
        f"address add fd98::{number + 1:x}/64 dev eth0 nodad",
        "link set eth0 up",
        "link set eth1 up",
    )
    run(["ip", "-batch", "-"], stdin="".join(f"{command}\n" for command in commands))
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


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
