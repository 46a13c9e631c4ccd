# SPDX-License-Identifier: Apache-2.0
"""Loading one BPF object file: its maps shared with other objects by pins, its programs pinned."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Final

from agent.core.errors import KernelError
from agent.kernel.bpf import libbpf, syscall
from agent.kernel.bpf.map import Map, map_id
from agent.kernel.files import Descriptor

_NONE: Final = MappingProxyType[str, int]({})
_NOWHERE: Final = MappingProxyType[str, Path]({})
_one = Lock()  # two loads at once would both find a map's pin missing


def load(
    path: Path,
    maps: Path,
    programs: Mapping[str, Path] | Callable[[str], Path],
    sizes: Mapping[str, int] = _NONE,
    constants: bytes = b"",
    elsewhere: Mapping[str, Path] = _NOWHERE,
) -> tuple[str, ...]:
    """Loads the object file `path`, shares its maps in `maps`, pins its programs; their names.

    `constants` are the contents of its section .rodata, where it has one; `elsewhere` pins of maps not in `maps`.

    A map that is pinned already is used with its contents and its size; `sizes` (entries, by a map's name) is for
    those that are made now. A program that is pinned already and is the same, on the same maps, stays, and so its
    id; another is replaced at once. After a failure, maps that were made stay pinned. Raises KernelError, with the
    verifier's last words when it refused a program.
    """
    with _one, libbpf.messages() as messages:
        for directory in {maps, *(path.parent for path in elsewhere.values())}:
            _directory(directory)
        obj = libbpf.pointer("bpf_object__open_file", os.fsencode(path), None)
        if not obj:
            raise _refused(f"open BPF object {path}", ctypes.get_errno(), messages)
        try:
            shared = list(_share(obj, maps, sizes, constants, messages, elsewhere))
            if (result := libbpf.ask("bpf_object__load", obj)) < 0:
                raise _refused(f"load BPF object {path}", -result, messages)
            ids = {map_id(libbpf.ask("bpf_map__fd", each)) for each in shared}
            return tuple(_pin(obj, programs if callable(programs) else programs.__getitem__, ids))
        finally:
            libbpf.close(obj)


def _share(
    obj: int,
    maps: Path,
    sizes: Mapping[str, int],
    constants: bytes,
    messages: list[str],
    elsewhere: Mapping[str, Path],
) -> Iterator[int]:
    """Yields the object's maps but for those of the compiler, each with its pin path and its size."""
    for each in _walk("bpf_object__next_map", obj):
        name = libbpf.text("bpf_map__name", each)
        if "." in name:  # .rodata, .bss and the like are each program's own
            if constants and name.endswith(".rodata"):
                result = libbpf.ask("bpf_map__set_initial_value", each, constants, len(constants))
                if result < 0:
                    raise _refused(f"set the constants of BPF map {name}", -result, messages)
            continue
        pin = elsewhere.get(name, maps / name)
        if (result := libbpf.ask("bpf_map__set_pin_path", each, os.fsencode(pin))) < 0:
            raise _refused(f"pin BPF map {name}", -result, messages)
        if size := _size(pin) or sizes.get(name, 0):
            result = libbpf.ask("bpf_map__set_max_entries", each, size)
            if result < 0:
                raise _refused(f"size BPF map {name} to {size}", -result, messages)
        yield each


def _size(pin: Path) -> int:
    """Returns the size of a pinned map, so that another size in the settings never prevents loading; 0 without."""
    if not pin.exists():
        return 0
    with Map.open(pin) as held:
        return held.max_entries


def _pin(obj: int, programs: Callable[[str], Path], shared: set[int]) -> Iterator[str]:
    for each in _walk("bpf_object__next_program", obj):
        name = libbpf.text("bpf_program__name", each)
        fd = libbpf.ask("bpf_program__fd", each)
        path = programs(name)
        libbpf.check(f"load BPF program {name}", fd)
        if not _same(path, syscall.program_info(fd), shared):
            syscall.pin(fd, path)
        yield name


def _same(path: Path, new: syscall.ProgramInfo, shared: set[int]) -> bool:
    """Compares maps too: the same instructions may be pinned on maps without pins, which no other program sees."""
    if (fd := syscall.find(path)) is None:
        return False
    with Descriptor(fd):
        old = syscall.program_info(fd)
    return (old.tag, shared.intersection(old.maps)) == (new.tag, shared.intersection(new.maps))


def _walk(step: str, obj: int) -> Iterator[int]:
    each = libbpf.pointer(step, obj, None)
    while each:
        yield each
        each = libbpf.pointer(step, obj, each)


def _directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(f"make {path}", error.errno or 0, error.strerror or str(error)) from error


def _refused(operation: str, number: int, messages: list[str]) -> KernelError:
    reason = libbpf.verdict(messages)
    return KernelError(
        operation, number, f"{libbpf.error_text(number)}; {reason}" if reason else libbpf.error_text(number)
    )
