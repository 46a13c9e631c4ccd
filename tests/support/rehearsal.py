# SPDX-License-Identifier: Apache-2.0
"""One node with Sluice as an archive of tools/dist installs it, what may go wrong with it, what it says of itself."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.node import until
from support.rehearsalnodes import PROVISION, Machine, dist, machines

CONF, BIN = "/etc/cni/net.d", "/opt/cni/bin"
OURS, PRIMARY = f"{CONF}/02-sluice.conflist", f"{CONF}/10-lab.conflist"
PATIENCE = 40.0  # seconds; nothing here is a measurement
SERVER = "httpd -f -p 8080 -h /www"
_HELD = {"/etc/cni": "/root/etc-cni", BIN: "/root/cni-bin"}


@dataclass(frozen=True)
class Verified:
    """What `sluice verify --all` said: exit code, rows by name, and its table."""

    code: int
    rows: Mapping[str, Mapping[str, Any]]
    table: str

    @property
    def wrong(self) -> dict[str, str]:
        """Name of each row that is not right, with what it says."""
        return {
            name: row["error"] or "; ".join(row["differences"])
            for name, row in self.rows.items()
            if row["result"] != "ok"
        }


class Node:
    """Commands of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def on(self, command: str, **options: Any) -> str:
        """Its output. Raises CommandError."""
        return self.machine.on(command, **options).stdout

    def code(self, command: str) -> int:
        return self.machine.on(command, check=False).returncode

    def put(self, path: str, text: str) -> None:
        self.on(f"cat >{path}.part && mv {path}.part {path}", stdin=text)

    # --- Sluice

    def deploy(self, archive: Path) -> None:
        """Beside what is there; made current, not restarted."""
        there = f"/root/{archive.name}"
        if self.code(f"test -e '{there}'"):
            self.machine.path(there).write_bytes(archive.read_bytes())
        self.on(f"{PROVISION}/sluice.sh '{there}'")

    def configure(self, **changes: Any) -> None:
        """Settings, one a line of the file; those that are given replace those that are there."""
        lines = [line for line in self.on("cat /etc/sluice.yaml").splitlines() if line.split(":")[0] not in changes]
        self.put("/etc/sluice.yaml", "\n".join([*lines, *(f"{k}: {json.dumps(v)}" for k, v in changes.items())]) + "\n")

    def verify(self, *more: str) -> Verified:
        """Both forms are asked for; they must agree."""
        done = self.machine.on(f"sluice verify --all -o json {' '.join(more)}", check=False)
        rows = {f"{row['namespace']}/{row['name']}".lstrip("/"): row for row in json.loads(done.stdout or "[]")}
        table = self.machine.on("sluice verify --all", check=False)
        return Verified(done.returncode, rows, table.stdout + table.stderr)

    def right(self) -> None:
        """Awaits that all is as it should be."""
        until(lambda: self.code("sluice verify --all") == 0, "verify --all ends with 0", PATIENCE)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.on("sluice status -o json"))
        return found

    def await_ready(self) -> None:
        """The agent takes pods and a ztunnel has all of them."""

        def ready() -> bool:
            done = self.machine.on("sluice status -o json", check=False)
            status = json.loads(done.stdout or "{}")
            return bool(status.get("ready") and status["ztunnel_connections"] and not status["ztunnel_unacknowledged"])

        until(ready, "the agent is ready and has a ztunnel", PATIENCE)

    def leaked(self) -> int:
        return sum(row["connections"] for row in self.status()["connections"] if row["fate"] == "leaked")

    # --- pods

    def run(self, key: str, command: str = "sleep 2147483647") -> str:
        """An enrolled pod; its address."""
        return self.on(f"pod run {key} --enrolled -- sh -c '{command}'").strip()

    def stop(self, key: str) -> None:
        self.on(f"pod stop {key}")

    def traffic(self, key: str, address: str) -> None:
        """A pod that opens a connection after the other."""
        loop = f"if timeout 10 wget -q -O /dev/null http://{address}:8080/; then ok=$((ok+1)); else no=$((no+1)); fi"
        self.run(key, f"ok=0 no=0; while :; do {loop}; echo $ok $no >/tmp/count; done")

    def count(self, key: str) -> tuple[int, int]:
        """Of its connections: those that went well, those that failed."""

        def read() -> tuple[int, int] | None:
            words = self.machine.on(f"pod exec {key} -- cat /tmp/count", check=False).stdout.split()
            return (int(words[0]), int(words[1])) if len(words) == 2 else None  # else it is just being written

        found: tuple[int, int] = until(read, f"{key} counts")
        return found

    def more(self, key: str, number: int = 20) -> None:
        wanted = self.count(key)[0] + number
        until(lambda: self.count(key)[0] >= wanted, f"{number} connections more of {key}", PATIENCE)

    def pods(self) -> list[dict[str, Any]]:
        """As `sluice pods` lists them."""
        found: list[dict[str, Any]] = json.loads(self.on("sluice pods -o json"))
        return found

    def left_alone(self) -> bool:
        """True if no pod was verified lately: a new one is verified every two seconds until its probe gets through."""
        rows = self.pods()
        return all(row["probe"] and time.time() - row["verified"] > 4 for row in rows)

    def netns(self, key: str) -> str:
        """Path of a captured pod's network namespace, as the agent pinned it."""
        uid = next(row["uid"] for row in self.pods() if f"{row['namespace']}/{row['name']}" == key)
        return f"/run/sluice/netns/{uid}"

    # --- CNI configuration

    def wrapped(self) -> bool:
        """Whether the first list is ours, around what the primary CNI has now."""
        names = [name for name in self.on(f"ls {CONF}").split() if name.endswith(".conflist")]
        ours, primary = (json.loads(self.on(f"cat {CONF}/{name}"))["plugins"] for name in names[:2])
        return ours[-1]["type"] == "sluice-cni" and ours[:-1] == primary

    @contextlib.contextmanager
    def held(self) -> Iterator[dict[str, str]]:
        """Whoever uses the directories of CNI by their names can read them alone: the agent sees, and cannot repair.

        Yields by which names they can be written.
        """
        for place, beside in _HELD.items():
            self.on(f"mkdir -p {beside}; mount --bind {place} {beside}; mount --bind {place} {place}")
            self.on(f"mount -o remount,bind,ro {place}")
        try:
            yield _HELD
        finally:
            for place, beside in _HELD.items():
                self.on(f"umount --lazy {place}; umount --lazy {beside}")


@contextlib.contextmanager
def node(prefix: str, archive: Path | None = None, **settings: Any) -> Iterator[Node]:
    """With Sluice of this checkout or of `archive`, ready."""
    with machines(prefix, ("server",)) as made:
        here = Node(made["server"])
        if settings:
            here.on("printf 'kube_server: none\\nown_namespace: sluice-system\\ncni_install: own\\n' >/etc/sluice.yaml")
            here.configure(**{"ztunnel_ports": ["15001", "15006"], "backend": "nftables", **settings})
        here.deploy(archive or dist())
        here.await_ready()
        yield here
