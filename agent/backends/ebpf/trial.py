# SPDX-License-Identifier: Apache-2.0
"""Throw-away layers for the functional self-test: programs and maps of their own, and this process as ztunnel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from agent.backends.base import PodLayer
from agent.backends.ebpf.backend import EbpfBackend
from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.programs import ProgramsBackend
from agent.backends.ebpf.ztunnels import Ztunnels
from agent.kernel.bpf import bpffs
from agent.kernel.process import Process


@contextmanager
def layers(pins: Pins) -> Iterator[tuple[PodLayer, ...]]:
    """Lasts as long as a `with`; captured pods are not affected, since maps say which pods the programs handle.

    Raises KernelError.
    """
    ztunnels = Ztunnels()
    place = pins.within(f"test-{os.getpid()}")
    ztunnels.arrived(Process(os.getpid(), os.pidfd_open(os.getpid())))
    bpffs.mount(pins.mount)
    try:
        yield ProgramsBackend(place, ztunnels), EbpfBackend(place, ztunnels)
    finally:
        for process in ztunnels.processes():
            process.close()
        bpffs.remove_tree(place.root)
