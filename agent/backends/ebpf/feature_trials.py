# SPDX-License-Identifier: Apache-2.0
"""Trials of the eBPF backend's requirements: each feature on its own, nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final

from agent.backends.base import Support
from agent.backends.ebpf import attachments, object_files
from agent.backends.ebpf.object_files import INGRESS, LOOKUP, NODE, BpfProgram
from agent.backends.ebpf.pins import PinDirectory, Pins
from agent.core.errors import KernelError, SluiceError
from agent.core.names import BPF_DIR
from agent.kernel import scratch
from agent.kernel.bpf import bpffs, libbpf, link, load, syscall
from agent.kernel.files import Descriptor

_LOOPBACK = 1


def attempt(feature: str, root: str = BPF_DIR) -> None:
    """Tries one feature of TRIALS. Raises SluiceError with what was refused."""
    TRIALS[feature](Pins.of(root))


def support(pins: Pins) -> Support:
    """Programs of this build that are attached prove more than any trial could."""
    try:
        if not _runs(pins):
            for trial in TRIALS.values():
                trial(pins)
    except SluiceError as error:
        return Support(False, str(error))
    return Support(True)


def _runs(pins: Pins) -> bool:
    if object_files.missing() or not pins.node.path.exists():
        return False
    have = attachments.read(pins.node, NODE)
    return not any(True for _ in attachments.steps({one.name: one for one in NODE}, have))


def _objects(pins: Pins) -> None:
    if lacking := object_files.missing():
        raise SluiceError(f"this installation has no {', '.join(lacking)}.bpf.o")


def _loading(name: str) -> Callable[[Pins], None]:
    def trial(pins: Pins) -> None:
        with _pin_directory(pins) as directory:
            _load(directory, name)

    return trial


def _lookup(pins: Pins) -> None:
    _in_scratch(pins, LOOKUP, lambda program: link.attach_netns(program, _own_namespace(), LOOKUP.attach))


def _tcx(pins: Pins) -> None:
    _in_scratch(pins, INGRESS, lambda program: link.attach_tcx(program, _LOOPBACK, INGRESS.attach))


def _in_scratch(pins: Pins, program: BpfProgram, attach: Callable[[int], int]) -> None:
    with _pin_directory(pins) as directory:
        _load(directory, program.object)
        with Descriptor(syscall.get(directory.program(program))) as descriptor:
            os.close(scratch.call(lambda: attach(descriptor)))


def _own_namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _load(directory: PinDirectory, name: str) -> None:
    named = {one.name: directory.program(one) for one in (*object_files.NODE, *object_files.POD) if one.object == name}
    load.load(object_files.path(name), directory.path / "maps", named)


@contextmanager
def _pin_directory(pins: Pins) -> Iterator[PinDirectory]:
    """Returns pins of this process alone, apart from those in use; with maps of their own."""
    bpffs.mount(pins.mount)
    directory = PinDirectory(pins.root / f"try-{os.getpid()}")
    try:
        yield directory
    finally:
        bpffs.remove_tree(directory.path)
        with suppress(OSError):  # in use
            pins.root.rmdir()


def _cgroups(pins: Pins) -> None:
    bpffs.cgroup_root()


def _libbpf(pins: Pins) -> None:
    result = libbpf.ask("bpf_obj_get", b"/")  # no pin; but the answer shows that the library was opened
    if result >= 0:
        raise KernelError("open libbpf.so.1", 0, "it opened a directory as a BPF object")


# In this order: what a later one needs comes before it.
TRIALS: Final[Mapping[str, Callable[[Pins], None]]] = {
    "eBPF objects": _objects,
    "libbpf": _libbpf,
    "cgroup v2 hierarchy": _cgroups,
    "bpffs": lambda pins: bpffs.mount(pins.mount),
    "cgroup/connect": _loading("connect"),
    "cgroup/sendmsg, recvmsg": _loading("datagram"),
    "cgroup/bind": _loading("bind"),
    "cgroup/getpeername, getsockopt": _loading("names"),
    "sockops": _loading("events"),
    "sk_lookup": _lookup,
    "tcx": _tcx,
}
