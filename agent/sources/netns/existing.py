# SPDX-License-Identifier: Apache-2.0
"""Finds the network namespaces of this node without an agent: by pins, names and processes.

Readable facts in the run directory are used, but none is required.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any

from agent.core.errors import NetnsError, SluiceError
from agent.core.model.pods import UID
from agent.kernel.netns import Netns, NetnsId
from agent.sources.netns.search import NETNS_DIRS
from agent.sources.state.notes import Notes

_PROC = "/proc/[0-9]*/ns/net"


@dataclass(frozen=True, slots=True)
class ExistingNetns:
    """The facts of a note or a pin. `netns` is None if unknown; `path` is "" or where a source found it."""

    uid: str
    name: str
    _: KW_ONLY
    captured: bool
    netns: NetnsId | None
    path: str


def known(run_dir: str) -> tuple[ExistingNetns, ...]:
    """Reads all notes, and pins without a readable note. Changes nothing; unreadable notes are left out."""
    notes = {note.uid: note for note in map(_note, sorted(Path(run_dir, "pods").glob("*.json"))) if note}
    bare = [pin.name for pin in _pins(run_dir) if pin.name not in notes]
    return (*notes.values(), *(ExistingNetns(uid, "", captured=True, netns=None, path="") for uid in bare))


def netns_paths(run_dir: str, known: Iterable[ExistingNetns]) -> tuple[Path, ...]:
    """Returns paths to namespaces of this node; many lead to the same one."""
    named = [path for folder in NETNS_DIRS for path in sorted(Path(folder).glob("*"))]
    noted = [Path(one.path) for one in known if one.path]
    return (*_pins(run_dir), *noted, *named, *sorted(Path("/").glob(_PROC.lstrip("/"))))


def namespaces(paths: Iterable[Path], problems: list[str]) -> Iterator[Netns]:
    """Yields each namespace once, for the caller to close, without the host's and invalid paths.

    Failures to enter one are added to `problems`.
    """
    seen: set[tuple[int, int]] = set()
    for path in paths:
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            netns = Netns.open(path)
        except (OSError, NetnsError):
            continue
        except SluiceError as error:
            problems.append(str(error))
            continue
        yield netns


def pod(netns: Netns, run_dir: str, known: Iterable[ExistingNetns]) -> ExistingNetns | None:
    """Returns the pod of the namespace, by its pin or its note. A captured one is preferred."""
    matching = [one for one in known if _is(netns, run_dir, one)]
    return max(matching, key=lambda one: one.captured, default=None)


def forget(run_dir: str, uids: Iterable[str]) -> None:
    """Removes their notes and pins, including half-written or damaged notes."""
    for uid in uids:
        Notes(run_dir).remove(uid)
        for end in (".new", ".damaged"):
            Path(run_dir, "pods", uid + end).unlink(missing_ok=True)


def _is(netns: Netns, run_dir: str, one: ExistingNetns) -> bool:
    if one.netns is not None:
        return netns.id.same(one.netns)
    with contextlib.suppress(OSError):
        status = Path(run_dir, "netns", one.uid).stat()
        return (status.st_dev, status.st_ino) == (netns.id.device, netns.id.inode)
    return False


def _pins(run_dir: str) -> tuple[Path, ...]:
    return tuple(sorted(path for path in Path(run_dir, "netns").glob("*") if UID.fullmatch(path.name)))


def _note(path: Path) -> ExistingNetns | None:
    try:
        data = json.loads(path.read_bytes())
        pod: dict[str, Any] = data["pod"]
        numbers = data["netns"] and [int(data["netns"][field.name]) for field in fields(NetnsId)]
        netns = NetnsId(*numbers) if numbers else None
        name = f"{pod['namespace']}/{pod['name']}"
        return ExistingNetns(
            path.stem, name, captured=bool(data["captured"]), netns=netns, path=str(pod.get("netns_path", ""))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
