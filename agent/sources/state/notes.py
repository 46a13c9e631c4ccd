# SPDX-License-Identifier: Apache-2.0
"""Keeps a note of each pod on disk, so that a later process finds the pod without any other source.

<run_dir>/pods/<uid>.json holds the facts, <run_dir>/netns/<uid> pins the namespace. The namespace's cookie is
noted: a path may lead to another namespace later, device and inode numbers are reused, a cookie is not.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import KW_ONLY, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from agent.core.errors import SluiceError
from agent.core.model.pods import UID, Pod, PodMark
from agent.kernel.netns import NetnsId, unpin

log = logging.getLogger("sluice.state")
_APART = ("containers", "runtime_class", "orphan", "unmarked")  # of a Pod, not in the "pod" part of a note


@dataclass(frozen=True, slots=True)
class Note:
    """One pod as it stands on disk. `netns` is None for a pod that was never captured.

    `preexisting` are the socket cookies of connections that are older than the enrolment, `preswitch` those of
    connections that are older than a switch between NAT and eBPF.
    """

    pod: Pod
    _: KW_ONLY
    captured: bool
    netns: NetnsId | None
    preexisting: tuple[int, ...] = ()
    preswitch: tuple[int, ...] = ()


class Notes:
    """Reads and writes notes."""

    def __init__(self, run_dir: str) -> None:
        self.pods = Path(run_dir) / "pods"
        self.pins = Path(run_dir) / "netns"
        self.damaged: list[str] = []

    def pin(self, uid: str) -> Path:
        return self.pins / uid

    def load(self) -> Iterator[Note]:
        """Yields all notes. A damaged one is renamed and logged, and never stops the others."""
        self.pods.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sweep()
        for path in sorted(self.pods.glob("*.json")):
            try:
                note = _decode(json.loads(path.read_bytes()))
                if note.pod.uid != path.stem:
                    raise ValueError(f"it is about pod {note.pod.uid}")
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                aside = path.with_suffix(".damaged")
                path.replace(aside)
                self.damaged.append(path.name)
                log.error(
                    "damaged state file %s (%s): kept as %s; the pod keeps its rules, restart the pod",
                    path,
                    error,
                    aside.name,
                )
                continue
            yield note

    def _sweep(self) -> None:
        """Removes leftovers of a crash: half-written notes, and pins that would keep a namespace for ever."""
        for path in self.pods.glob("*.new"):
            path.unlink()
        for pin in self.pins.glob("*"):
            if not (self.pods / f"{pin.name}.json").exists():
                unpin(pin)
                log.warning("removed the pin %s: no note names its pod", pin)

    def save(self, note: Note) -> None:
        """Raises SluiceError, with the path: a pod that cannot be noted is not captured."""
        try:
            self._save(note)
        except OSError as error:
            raise SluiceError(f"cannot write a note in {self.pods}: {error.strerror}") from error

    def _save(self, note: Note) -> None:
        self.pods.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.pods / f"{note.pod.uid}.json"
        content = json.dumps(_encode(note), indent=1, sort_keys=True)
        if path.exists() and path.read_bytes() == content.encode():
            return
        replace_text(path, content)

    def remove(self, uid: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.pods / f"{uid}.json").unlink()
        unpin(self.pin(uid))


def replace_text(path: Path, content: str) -> None:
    """Calls `replace_bytes`."""
    replace_bytes(path, content.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Writes to a temporary name and renames, so that the file is never half written. Raises OSError.

    No fsync: the run directory is memory, and no pod or namespace survives a reboot.
    """
    temporary = path.with_suffix(".new")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    temporary.replace(path)


def _encode(note: Note) -> dict[str, Any]:
    return {
        "version": 1,
        "captured": note.captured,
        "netns": asdict(note.netns) if note.netns else None,
        "outside": list(note.preexisting),
        "carried": list(note.preswitch),
        "unmarked": asdict(note.pod.unmarked) if note.pod.unmarked else None,
        # An older release would treat unknown keys as damage; Kubernetes sends these facts again anyway.
        "pod": {k: v for k, v in asdict(note.pod).items() if v not in ("", (), {}, False) and k not in _APART},
    }


def _decode(data: dict[str, Any]) -> Note:
    """Raises ValueError, KeyError or TypeError: anything that `save` would not have written."""
    if data["version"] != 1:
        raise ValueError(f"unknown version {data['version']!r}")
    known = {field.name: str(field.type) for field in fields(Pod) if field.name != "unmarked"}
    given = data["pod"]
    if not UID.fullmatch(given["uid"]):
        raise ValueError("its UID is not one")
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"unknown key {name!r}")
        if not _is(known[name], value):
            raise ValueError(f"{name} is of another type")
    for address in given.get("addresses", ()):
        ipaddress.ip_address(address)
    facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    preexisting, preswitch = (_cookies(data, name) for name in ("outside", "carried"))
    facts["unmarked"] = _mark(data.get("unmarked"))  # absent from older notes
    return Note(
        Pod(**facts),
        captured=bool(data["captured"]),
        netns=_netns(data["netns"]),
        preexisting=preexisting,
        preswitch=preswitch,
    )


def _mark(given: object) -> PodMark | None:
    if given is None:
        return None
    known = {field.name: str(field.type) for field in fields(PodMark)}
    if not isinstance(given, dict) or given.keys() != known.keys():
        raise ValueError("unmarked is of another type")
    if not all(_is(known[name], value) for name, value in given.items()):
        raise ValueError("unmarked is of another type")
    return PodMark(**given)


def _cookies(data: dict[str, Any], name: str) -> tuple[int, ...]:
    cookies = data.get(name, [])  # absent from older notes
    if not isinstance(cookies, list) or not all(type(number) is int for number in cookies):
        raise ValueError(f"{name} is of another type")
    return tuple(cookies)


def _is(kind: str, value: object) -> bool:
    match kind:
        case "tuple[str, ...]":
            return isinstance(value, list) and all(isinstance(item, str) for item in value)
        case "bool":
            return isinstance(value, bool)
        case "str":
            return isinstance(value, str)
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _netns(given: object) -> NetnsId | None:
    if given is None:
        return None
    if not isinstance(given, dict) or not all(type(number) is int for number in given.values()):
        raise ValueError("netns is of another type")
    return NetnsId(**given)
