# SPDX-License-Identifier: Apache-2.0
"""Programs and their links in one place, the node's or a pod's: read, compared, made. The same for both."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Final

from agent.backends.ebpf import object_files
from agent.backends.ebpf.object_files import BpfProgram
from agent.backends.ebpf.pins import PinDirectory, Pins, pin
from agent.core.errors import KernelError
from agent.core.model.plan import Step
from agent.kernel.bpf import bpffs, load, syscall
from agent.kernel.bpf import link as bpflink
from agent.kernel.bpf.link import LinkInfo
from agent.kernel.files import Descriptor
from agent.kernel.netns import Netns

_NOWHERE: Final = MappingProxyType[str, Path]({})
# tcx takes a program once only, and the kernel frees the link that a killed agent had not pinned yet a moment later.
_TRIES = 50
_AGAIN = 0.02


@dataclass(frozen=True, slots=True)
class Attached:
    """`ids`: program -> the kernel's number of it, for those of this build that are loaded. `links` by name.

    `old` are names of pins of programs that are not of this build, or not wanted here.
    """

    ids: Mapping[str, int] = field(default_factory=dict)
    links: Mapping[str, LinkInfo] = field(default_factory=dict)
    old: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """Loads an object file and pins its programs."""

    object: str


@dataclass(frozen=True, slots=True)
class Attach:
    """Makes a link; `swap`: puts the program into the one that is there, with no moment between."""

    link: str
    program: BpfProgram
    swap: bool = False


@dataclass(frozen=True, slots=True)
class Detach:
    link: str


@dataclass(frozen=True, slots=True)
class Unpin:
    """The removal of a program's pin, by the pin's name."""

    program: str


Change = Load | Attach | Detach | Unpin


def read(directory: PinDirectory, programs: tuple[BpfProgram, ...]) -> Attached:
    """Raises KernelError."""
    pinned = directory.programs()
    mine = {program.name: pin(program) for program in programs}
    numbers = {
        name: _number(f"{directory.path}/programs/{file}", pinned[file])
        for name, file in mine.items()
        if file in pinned
    }
    links = {}
    for name in directory.links():
        if (fd := syscall.find(f"{directory.path}/links/{name}")) is not None:
            with Descriptor(fd):
                links[name] = bpflink.info(fd)
    old = tuple(name for name in pinned if name not in mine.values())
    return Attached({name: number for name, number in numbers.items() if number}, links, old)


@lru_cache(4096)
def _number(path: str, inode: int) -> int:
    """Returns the kernel's number of a pinned program; 0 when its pin has just gone."""
    if (fd := syscall.find(path)) is None:
        return 0
    with Descriptor(fd):
        return syscall.program_info(fd).id


def steps(want: Mapping[str, BpfProgram], have: Attached) -> Iterator[tuple[Step[Change], str]]:
    """Yields what makes `want` (link -> program) true, and what was wrong, "" for mere tidying up. Pure."""
    lacking = {program.object for program in want.values() if program.name not in have.ids}
    for name in sorted(lacking):
        yield Step(f"bpftool prog loadall {name}.bpf.o", Load(name)), f"programs of {name}.bpf.o are not loaded"
    # First: one that a killed agent has made and not yet given its name would stand in the way of its like.
    for link in sorted(have.links.keys() - want.keys()):
        yield Step(f"detach {link}", Detach(link)), f"{link} is not wanted"
    for link, program in want.items():
        attached = have.links.get(link)
        if attached is None or not attached.target:
            wrong = f"{link} is {'not attached' if attached is None else 'detached'}"
            yield Step(f"attach {program.name} {program.attach.name.lower()} ({link})", Attach(link, program)), wrong
        elif attached.program_id != have.ids.get(program.name):
            step: Step[Change] = Step(f"replace the program of {link}", Attach(link, program, swap=True))
            yield step, f"{link} runs another program"
    for old in have.old:
        yield Step(f"unpin {old}", Unpin(old)), ""


def do(
    change: Change,
    pins: Pins,
    directory: PinDirectory,
    attach: Callable[[BpfProgram, str, int], int],
    sizes: Mapping[str, int],
    constants: bytes = b"",
    elsewhere: Mapping[str, Path] = _NOWHERE,
) -> None:
    """Makes one change. `attach(program, link, descriptor)` makes a link and returns its descriptor.

    `elsewhere`: pins of maps that are not with the others.

    Raises KernelError.
    """
    if isinstance(change, Load):
        every = (*object_files.NODE, *object_files.POD, *object_files.ACCOUNTING)
        named = {one.name: directory.program(one) for one in every if one.object == change.object}
        load.load(object_files.path(change.object), pins.maps, named, sizes, constants, elsewhere)
    elif isinstance(change, Attach):
        with Descriptor(syscall.get(directory.program(change.program))) as program:
            _attach(change, program, directory, attach)
    elif isinstance(change, Detach):
        bpffs.remove_tree(directory.link(change.link))
    else:
        bpffs.remove_tree(directory.path / "programs" / change.program)


def _attach(
    change: Attach, program: int, directory: PinDirectory, attach: Callable[[BpfProgram, str, int], int]
) -> None:
    if change.swap:
        with Descriptor(syscall.get(directory.link(change.link))) as link:
            bpflink.update(link, program)
    else:
        with Descriptor(attach(change.program, change.link, program)) as link:
            syscall.pin(link, directory.link(change.link))


def attach_tcx(netns: Netns, program: BpfProgram, link: str, descriptor: int) -> int:
    """Attaches to the interface that ends the link's name, in that namespace. Raises KernelError."""
    index = int(link.rpartition("-")[2])
    for _ in range(_TRIES):
        try:
            return netns.call(lambda: bpflink.attach_tcx(descriptor, index, program.attach))
        except KernelError as error:
            if error.errno != errno.EEXIST:
                raise
            time.sleep(_AGAIN)
    return netns.call(lambda: bpflink.attach_tcx(descriptor, index, program.attach))


def attach_cgroup(program: BpfProgram, _: str, descriptor: int) -> int:
    """Attaches to the root of all cgroups. Raises KernelError."""
    with Descriptor(os.open(bpffs.cgroup_root(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as cgroup:
        return bpflink.attach_cgroup(descriptor, cgroup, program.attach)
