# SPDX-License-Identifier: Apache-2.0
"""A node's directories as real files, a runtime that reads them as libcni does, and what rewrites them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.core.settings import Settings, build
from agent.install import planning
from agent.install.installer import Installer
from agent.install.planning import Action, Remove, View

CALICO = {
    "name": "k8s-pod-network",
    "cniVersion": "0.3.1",
    "plugins": [{"type": "calico", "ipam": {"type": "calico-ipam"}}, {"type": "portmap", "snat": True}],
}
NOBODY = Path("/nonexistent/proc")  # a node on which no runtime runs: what its files say counts


def text(network: dict[str, Any], *extra: str) -> bytes:
    """The list, with further plugins."""
    return json.dumps({**network, "plugins": [*network["plugins"], *({"type": kind} for kind in extra)]}).encode()


def runtime_loads(directory: Path) -> list[dict[str, Any]]:
    """Every list in the runtime's order; go-cni fails on the first that it cannot take, so this raises ValueError."""
    found = []
    for path in sorted(directory.iterdir(), key=lambda path: path.name):
        if path.suffix not in (".conf", ".conflist", ".json") or path.is_dir():
            continue
        with contextlib.suppress(FileNotFoundError):  # removed since it was listed
            value = json.loads(path.read_bytes())
            if path.suffix != ".conflist":
                value = {"name": value["name"], "cniVersion": value["cniVersion"], "plugins": [value]}
            if not value["plugins"] or not all(plugin["type"] for plugin in value["plugins"]):
                raise ValueError(f"{path.name}: no plugins")
            found.append({**value, "path": path.name})
    return found


def types(network: dict[str, Any]) -> list[str]:
    return [plugin["type"] for plugin in network["plugins"]]


@dataclass
class Node:
    """`root` is where the host's file system is mounted."""

    root: Path
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in (self.conf, self.bin, self.root / "image"):
            path.mkdir(parents=True)
        self.source.write_bytes(b"\x7fELF plugin 1")
        self.source.chmod(0o755)

    @property
    def conf(self) -> Path:
        return self.root / "etc/cni/net.d"

    @property
    def bin(self) -> Path:
        return self.root / "opt/cni/bin"

    @property
    def source(self) -> Path:
        return self.root / "image/sluice-cni"

    def settings(self, **changes: Any) -> Settings:
        values = {
            "cni_install": "own",
            "host_root": str(self.root),
            "cni_plugin": str(self.source),
            "run_dir": str(self.root / "run"),
            **self.changes,
            **changes,
        }
        return build({}, {}, {key: (value, "test") for key, value in values.items()})

    def installer(self, clock: Callable[[], float] | None = None, **changes: Any) -> Installer:
        timed = {"clock": clock} if clock else {}
        return Installer(self.settings(**changes), NOBODY, **timed)

    def write(self, name: str, data: bytes, mode: int = 0o644) -> Path:
        path = self.conf / name
        path.write_bytes(data)
        path.chmod(mode)
        return path

    def first(self) -> dict[str, Any]:
        return runtime_loads(self.conf)[0]

    def snapshot(self) -> dict[str, tuple[object, ...]]:
        """Contents, and what a rewrite with the same content would change too."""
        found = {}
        for path in sorted([*self.conf.iterdir(), *self.bin.iterdir()]):
            status = path.lstat()
            found[path.name] = (path.read_bytes(), status.st_ino, status.st_mtime_ns, status.st_mode)
        return found


@contextlib.asynccontextmanager
async def running(installer: Installer) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(installer.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool], what: str, seconds: float = 10) -> None:
    """A bound for a test that fails, not a promise: what is promised is measured, see docs/cni-installation.md."""
    for _ in range(int(seconds * 100)):
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
            if condition():
                return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within {seconds} s: {what}")


@dataclass
class Reader:
    """A runtime that never stops looking at the directory."""

    directory: Path
    looks: int = 0
    uncaptured: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self._stop.is_set():
            try:
                found = runtime_loads_each(self.directory)
            except OSError:
                continue
            self.looks += 1
            first = next((one for one in found if one[1] is not None), None)
            if first is None or types(first[1] or {})[-1] != "sluice-cni":
                self.uncaptured.append(first[0] if first else "no list at all")
            self.torn += [name for name, value in found if value is None and "sluice" in name]

    def __enter__(self) -> Reader:
        self._thread = threading.Thread(target=self.run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def runtime_loads_each(directory: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """(name, list or None when it cannot be taken), in the runtime's order."""
    found = []
    for name in sorted(path.name for path in directory.iterdir()):
        if not name.endswith((".conf", ".conflist", ".json")):
            continue
        try:
            value = json.loads((directory / name).read_bytes())
            value = value if name.endswith(".conflist") else {"plugins": [value]}
            types(value)[0]
        except FileNotFoundError:
            continue
        except (ValueError, LookupError, TypeError):
            value = None
        found.append((name, value))
    return found


def recreate(directory: Path) -> None:
    """As a primary plugin's clean-up does it."""
    shutil.rmtree(directory)
    directory.mkdir()


def apply(files: dict[str, bytes], action: Action) -> None:
    """As the file system does it: what is to be removed has to be there."""
    assert not isinstance(action, Remove) or action.name in files
    done = planning.after(View(files), [action]).files
    files.clear()
    files.update(done)
