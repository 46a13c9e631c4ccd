# SPDX-License-Identifier: Apache-2.0
"""A small imitation of systemctl for nodes that are namespaces: reads the real unit files, of them what ours use.

`systemctl start|stop|restart|enable|disable|is-active|is-enabled|status|daemon-reload|reboot`, --now and -q. A
service's supervisor lives on beside it (Restart=, RestartSec=); its output goes to /run/log/UNIT.log. `boot`, which no
real one has, is what the node's first process runs: all enabled units, in the order of After=.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

UNITS = Path("/etc/systemd/system")
WANTED = UNITS / "multi-user.target.wants"
STATE = Path("/run/systemctl")
LOGS = Path("/run/log")
CGROUPS = Path("/sys/fs/cgroup")
REBOOT = STATE / "reboot"  # whoever made the node looks for it


class Unit:
    def __init__(self, name: str) -> None:
        self.name = name if "." in name else f"{name}.service"
        base, at, instance = self.name.removesuffix(".service").partition("@")
        self.path = UNITS / (f"{base}@.service" if at else self.name)
        self.instance = instance
        self.main, self.keeper = STATE / f"{self.name}.main", STATE / f"{self.name}.keeper"

    def values(self, key: str) -> list[str]:
        lines = (line.strip() for line in self.path.read_text().splitlines())
        return [line.partition("=")[2].replace("%i", self.instance) for line in lines if line.startswith(f"{key}=")]

    def value(self, key: str, default: str = "") -> str:
        return (self.values(key) or [default])[-1]

    @property
    def oneshot(self) -> bool:
        return self.value("Type") == "oneshot"

    def active(self) -> bool:
        return self.main.exists() if self.oneshot else alive(pid(self.keeper))


def pid(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return 0


def alive(number: int) -> bool:
    with contextlib.suppress(OSError):
        return bool(number) and Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def start(unit: Unit) -> int:
    if not unit.path.exists():
        print(f"Failed to start {unit.name}: Unit {unit.name} not found.", file=sys.stderr)
        return 5
    if unit.active():
        return 0
    STATE.mkdir(parents=True, exist_ok=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    if unit.oneshot:
        for line in unit.values("ExecStart"):
            done = subprocess.run(shlex.split(line), check=False)
            if done.returncode:
                return 1
        unit.main.write_text("0")
        return 0
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            keep(unit)
        os._exit(0)
    os.wait()
    deadline = time.monotonic() + 10
    while not alive(pid(unit.main)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return 0


def keep(unit: Unit) -> None:
    """The supervisor's life."""
    unit.keeper.write_text(str(os.getpid()))
    _own_cgroup(unit)
    log = os.open(LOGS / f"{unit.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open("/dev/null", os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    os.closerange(3, 256)
    os.chdir("/")
    ending = False

    def end(number: int, frame: object) -> None:
        nonlocal ending
        ending = True

    signal.signal(signal.SIGTERM, end)
    while True:
        process = subprocess.Popen(shlex.split(unit.value("ExecStart")))
        unit.main.write_text(str(process.pid))
        while process.poll() is None and not ending:
            time.sleep(0.01)
        if ending:
            process.terminate()
            try:
                process.wait(float(unit.value("TimeoutStopSec", "90")))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if ending or unit.value("Restart", "no") == "no":
            break
        time.sleep(float(unit.value("RestartSec", "0.1")))
    unit.main.unlink(missing_ok=True)
    unit.keeper.unlink(missing_ok=True)
    os._exit(0)


def _own_cgroup(unit: Unit) -> None:
    """As systemd gives each service one: by it eBPF programs know ztunnel. $NODE_CGROUP is where the node's lie."""
    top = next((path for path in (CGROUPS, CGROUPS / "unified") if (path / "cgroup.procs").exists()), None)
    if top is not None:
        own = top / os.environ.get("NODE_CGROUP", "").lstrip("/") / "system.slice" / unit.name
        own.mkdir(parents=True, exist_ok=True)
        (own / "cgroup.procs").write_text(str(os.getpid()))


def stop(unit: Unit) -> int:
    if unit.oneshot:
        unit.main.unlink(missing_ok=True)
        return 0
    keeper = pid(unit.keeper)
    if alive(keeper):
        os.kill(keeper, signal.SIGTERM)
    while alive(keeper):
        time.sleep(0.01)
    return 0


def restart(unit: Unit) -> int:
    return stop(unit) or start(unit)


def status(unit: Unit) -> int:
    print(f"{unit.name}: {'active' if unit.active() else 'inactive'}")
    return 0 if unit.active() else 3


def is_active(unit: Unit) -> int:
    print("active" if unit.active() else "inactive")
    return 0 if unit.active() else 3


def enable(unit: Unit) -> int:
    WANTED.mkdir(parents=True, exist_ok=True)
    link = WANTED / unit.name
    link.unlink(missing_ok=True)
    link.symlink_to(unit.path)
    return 0


def is_enabled(unit: Unit) -> int:
    enabled = (WANTED / unit.name).is_symlink()
    print("enabled" if enabled else "disabled")
    return 0 if enabled else 1


def disable(unit: Unit) -> int:
    (WANTED / unit.name).unlink(missing_ok=True)
    return 0


def boot() -> int:
    left = {path.name: Unit(path.name) for path in WANTED.iterdir()} if WANTED.is_dir() else {}
    while left:
        free = [n for n, unit in left.items() if not set(" ".join(unit.values("After")).split()) & (set(left) - {n})]
        for name in sorted(free) or sorted(left)[:1]:
            start(left.pop(name))
    return 0


_VERBS = {
    "start": start, "stop": stop, "restart": restart, "reload-or-restart": restart, "status": status,
    "is-active": is_active, "is-enabled": is_enabled, "enable": enable, "disable": disable,
}  # fmt: skip


def main(argv: list[str]) -> int:
    words = [word for word in argv if not word.startswith("-")]
    match words:
        case ["daemon-reload"] | ["reset-failed", *_]:
            return 0
        case ["boot"]:
            return boot()
        case ["reboot"]:
            REBOOT.touch()
            return 0
        case [verb, first, *more] if verb in _VERBS:
            with contextlib.redirect_stdout(io.StringIO() if "-q" in argv else sys.stdout):
                codes = [_VERBS[verb](Unit(name)) for name in (first, *more)]
            if "--now" in argv and verb in ("enable", "disable"):
                codes += [(start if verb == "enable" else stop)(Unit(name)) for name in (first, *more)]
            return max(codes)
    print(f"systemctl {' '.join(argv)}: this imitation does not know that", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
