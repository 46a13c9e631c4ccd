# SPDX-License-Identifier: Apache-2.0
"""Three machines in namespaces, wired so that pods reach one another across them, as in the Vagrant lab.

Each has network, mounts, processes and host name of its own, and a containerd.

    server 192.0.2.1 (pods 10.244.1.0/24), worker1 192.0.2.2 (10.244.2.0/24), worker2 192.0.2.3 (10.244.3.0/24)

They are provisioned by the scripts of vagrant/provision. The processes of a machine are those of its PID namespace, so
that nothing of Sluice on one sees another, and powering off is ending its first process.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from support import criimages, systemctl
from support.crihost import CONFIG, PATH, REPO, check_programs, remove_cgroups
from support.node import until

from agent.core.errors import SluiceError
from agent.kernel.exec import run
from agent.lab import nodes
from agent.lab.lab import down
from agent.lab.lab_spec import LabSpec
from agent.lab.links import NO_DAD, Port, add_namespace, join, links, remove_namespace
from agent.lab.processes import Children, await_ready

NAMES = ("server", "worker1", "worker2")
PROVISION = REPO / "vagrant/provision"
_UPPER = ("etc", "opt", "var/lib", "usr/local", "root")
# Whatever this machine has there is not the node's.
_OPAQUE = ("etc/cni", "etc/containerd", "etc/systemd", "opt", "var/lib/cni", "usr/local/lib/sluice", "root")

# $1 is the machine's directory. Its own /run shows that directory too: containerd's disk is there.
_BOOT = """set -eu
hostname "$2"
for mount in $(cut -d' ' -f5 /proc/self/mountinfo | grep ^/run/ | tac); do
    umount --lazy $mount 2>/dev/null || :
done
top=$(dirname $1)
mkdir -p $1/run/${top##*/} $1/var
for name in etc opt var/lib usr/local root; do
    work=$1/disk/.work/$name && mkdir -p $work
    mount -t overlay -o lowerdir=/$name,upperdir=$1/disk/$name,workdir=$work overlay /$name
done
mount -t bpf -o mode=700 bpf /sys/fs/bpf
mount --bind $top $1/run/${top##*/}
mount --rbind $1/run /run
systemctl boot
: >$1/booted
trap 'exit 0' USR1
while :; do sleep 1000 & wait; done  # it reaps whoever ends without a parent
"""
_CONTAINERD = """[Unit]
Description=the container runtime
After=sluice-lab-network.service

[Service]
ExecStart=containerd
Restart=always

[Install]
WantedBy=multi-user.target
"""
_TOOLS = """#!/bin/sh
# Runs a command as root on a node: what ssh is for a machine.   usage: on NODE COMMAND...
node=$1; shift
pid=$(cat {base}/$node/pid 2>/dev/null) && [ -n "$pid" ] || {{ echo "on: $node is not reachable" >&2; exit 255; }}
exec nsenter --target "$pid" --mount --net --uts --pid --wd=/ -- env -i {environment} sh -c "$*"
"""


class Machine:
    """One node. `disk` of its directory outlives a reboot, `run` does not."""

    def __init__(self, spec: LabSpec, name: str, children: Children) -> None:
        self.spec, self.name, self._children = spec, name, children
        self.base, self.pid = spec.run_dir / name, 0
        self.netns = spec.netns_path(name)
        self.top = f"/{spec.prefix}/{name}"  # of its cgroups

    @property
    def number(self) -> int:
        return self.spec.nodes.index(self.name) + 1

    @property
    def subnet(self) -> str:
        return self.spec.pod_cidrs(self.name)[0]

    @property
    def address(self) -> str:
        return self.spec.underlay(self.name)[0]

    def path(self, name: str) -> Path:
        """Of a file of the node, seen from outside; valid until it is powered off."""
        return Path(f"/proc/{self.pid}/root", name.lstrip("/"))

    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.spec.run_dir}/bin:/usr/local/bin:{PATH}",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "SLUICE_PYTHON": sys.executable,
            "NODE_CGROUP": self.top,
            "POD_CGROUP": f"{self.top}/kubepods/besteffort",
        }

    def format(self) -> None:
        disk = self.base / "disk"
        for name in (*_UPPER, *_OPAQUE):
            (disk / name).mkdir(parents=True, exist_ok=True)
        for name in _OPAQUE:
            os.setxattr(disk / name, "trusted.overlay.opaque", b"y")
        (disk / "etc/containerd/config.toml").write_text(CONFIG.format(disk=self.base, pause=criimages.PAUSE))
        wanted = disk / "etc/systemd/system/multi-user.target.wants"
        wanted.mkdir(parents=True)
        (wanted.parent / "containerd.service").write_text(_CONTAINERD)
        (wanted / "containerd.service").symlink_to("/etc/systemd/system/containerd.service")

    def boot(self) -> None:
        add_namespace(self.spec.netns_name(self.name), NO_DAD)
        self._wire()
        (self.base / "booted").unlink(missing_ok=True)
        (self.base / "run").mkdir(exist_ok=True)
        environment = [f"{key}={value}" for key, value in self.environment().items()]
        argv = ["env", "-i", *environment, "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child",
                "--mount-proc", "--propagation", "private", "sh", "-c", _BOOT, "sh", str(self.base),
                self.name]  # fmt: skip
        child = self._children.start(self.name, argv, self.netns, self.base / "init.log")
        await_ready(child, (self.base / "booted").exists, 20, "booted")
        self.pid = int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()[0])
        (self.base / "pid").write_text(str(self.pid))

    def _wire(self) -> None:
        card = f"02:00:00:00:00:{self.number:02x}"  # it outlives a reboot: the others have it in their tables
        there = Port(self.spec.netns_name(self.name), "eth0", (f"{self.address}/24",))
        join(Port(self.spec.lan, self.name), there, address=card)
        with links(self.spec.lan) as segment:
            segment.up(self.name, master="br0")

    def power_off(self) -> None:
        """At once: what was in memory is gone, namespaces and all of /run included."""
        (self.base / "pid").unlink(missing_ok=True)
        self._children.kill(self.name)  # --kill-child: its namespace's first process dies with it, and all others do
        if self.pid:
            until(lambda: not Path(f"/proc/{self.pid}").exists(), f"{self.name} is off")
        self.pid = 0
        # The kernel removes a namespace's interfaces some time later: the next boot wants the name at once.
        with links(self.spec.lan) as segment:
            segment.delete(self.name)
        remove_namespace(self.spec.netns_name(self.name))
        remove_cgroups(f"{self.spec.prefix}/{self.name}")
        shutil.rmtree(self.base / "run", ignore_errors=True)

    def on(
        self, command: str, *, stdin: str = "", seconds: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """As the guide does it. Raises CommandError."""
        return run([str(self.spec.run_dir / "bin/on"), self.name, command], stdin=stdin, seconds=seconds, check=check)

    def provision(self, release: int = 1) -> None:
        """The primary CNI and the routes to the pods of the others, by the scripts of the Vagrant lab."""
        others = [f"{self.spec.pod_cidrs(o)[0]}={self.spec.underlay(o)[0]}" for o in self.spec.nodes if o != self.name]
        self.on(f"{PROVISION}/network.sh {shlex.join(others)}")
        self.on(f"{PROVISION}/cni.sh {self.subnet} {release}")


class Machines:
    def __init__(self, prefix: str, names: tuple[str, ...] = NAMES) -> None:
        self.spec = LabSpec(prefix, names)
        self.base = self.spec.run_dir
        self.all = {name: Machine(self.spec, name, Children(self.base / "processes")) for name in names}
        self._ended = threading.Event()
        self._rebooter = threading.Thread(target=self._reboots, daemon=True)
        self.failure: Exception | None = None

    def __getitem__(self, name: str) -> Machine:
        return self.all[name]

    def up(self) -> None:
        nodes.claim(self.spec)
        self._tools()
        add_namespace(self.spec.lan, NO_DAD)
        with links(self.spec.lan) as segment:
            segment.bridge("br0")
        for machine in self.all.values():
            machine.format()
            machine.boot()
            machine.provision()
        self._rebooter.start()

    def _tools(self) -> None:
        folder = self.base / "bin"
        folder.mkdir()
        _script(folder / "systemctl", f'#!/bin/sh\nexec {sys.executable} -s {systemctl.__file__} "$@"\n')
        first = next(iter(self.all.values()))
        words = " ".join(f'{key}="{value}"' for key, value in first.environment().items())
        words = words.replace(first.top, f"/{self.spec.prefix}/$node")
        _script(folder / "on", _TOOLS.format(base=self.base, environment=words))

    def _reboots(self) -> None:
        """A machine that was told to reboot does."""
        while not self._ended.wait(0.05):
            for machine in self.all.values():
                if (machine.base / "run/systemctl/reboot").exists():
                    try:
                        machine.power_off()
                        machine.boot()
                    except (SluiceError, AssertionError, OSError) as error:
                        self.failure = error
                        return

    def down(self) -> None:
        self._ended.set()
        if self._rebooter.is_alive():
            self._rebooter.join(60)
        for machine in self.all.values():
            machine.power_off()
        remove_cgroups(self.spec.prefix)
        down(self.spec.prefix)


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@contextlib.contextmanager
def machines(prefix: str, names: tuple[str, ...] = NAMES) -> Iterator[Machines]:
    """Booted and provisioned; afterwards nothing of them is left. Also what an earlier run left is removed first."""
    check_programs()
    down(prefix)
    remove_cgroups(prefix)
    made = Machines(prefix, names)
    try:
        made.up()
        yield made
    finally:
        made.down()


def dist(*argv: str) -> Path:
    """The archive of this checkout, or with --ref that of an older one."""
    done = subprocess.run([str(REPO / "tools/dist"), *argv, str(REPO / "build/dist")], capture_output=True, text=True)
    if done.returncode:
        raise SluiceError(done.stderr.strip())
    return Path(done.stdout.splitlines()[-1])


def previous() -> Path:
    """That of the version before this one."""
    return dist("--ref", (REPO / "tools/previous").read_text().split()[0])
