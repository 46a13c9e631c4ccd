# SPDX-License-Identifier: Apache-2.0
"""A machine of its own for a container runtime: network and mount namespace, /run, /etc, /opt and /var/lib.

Inside, every path is the one of a real node, and what is written there lies below /run/<prefix>: `disk` outlives a
reboot, `run` does not. Containers' cgroups lie below /<prefix> of each hierarchy. What runs there is found by the mount
namespace or by those cgroups, so nothing has to be recorded for it to be ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from support import criimages
from support.cri import Cri, CriError

from agent.core.errors import SluiceError
from agent.kernel import exec
from agent.kernel.exec import run
from agent.lab.lab_spec import LabSpec
from agent.lab.links import NO_DAD, add_namespace, links, remove_namespace
from agent.lab.processes import Children, await_ready, end, start_time

REPO = Path(__file__).resolve().parents[2]
PLUGINS = Path("/usr/lib/cni")  # Debian's containernetworking-plugins
CGROUPS = Path("/sys/fs/cgroup")
RESOLVER = "192.0.2.53"
PROGRAMS = REPO / "build" / "containerd"  # Debian's, unpacked; where they are installed it need not be there
PATH = f"{PROGRAMS}:{os.environ.get('PATH', '')}:{exec.PATH}"
_NEEDED = {"containerd": "containerd", "runc": "runc", "ctr": "containerd", "busybox": "busybox-static"}
_SYSCTLS = {**NO_DAD, "net/ipv4/ip_forward": 1}
_SOCKET = "run/containerd/containerd.sock"

# $1 is /run/<prefix>. The new /run shows that directory too: the logs, and containerd's own disk, lie there.
_MOUNTS = """set -eu
for mount in $(cut -d' ' -f5 /proc/self/mountinfo | grep ^/run/ | tac); do
    umount --lazy $mount 2>/dev/null || :  # or this copy would keep it alive; two may be at one place
done
mkdir -p $1/run/${1##*/} $1/var
for name in etc opt var/lib; do
    mkdir -p $1/disk/.work/$name
    mount -t overlay -o lowerdir=/$name,upperdir=$1/disk/$name,workdir=$1/disk/.work/$name overlay /$name
done
mount -t bpf -o mode=700 bpf /sys/fs/bpf
mount --bind $1 $1/run/${1##*/}
mount --rbind $1/run /run
: >$1/booted
exec sleep infinity
"""

CONFIG = """version = 2
root = "{disk}/var"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "/run/containerd/containerd.sock"
[ttrpc]
  address = "/run/containerd/containerd.sock.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{disk}/var/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_tcp_service = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""


class CriHost:
    """`root` is its file system, seen from outside; valid until the next `power_off`."""

    def __init__(self, spec: LabSpec, children: Children) -> None:
        self.spec, self.netns, self._children = spec, spec.netns_path("node1"), children
        self._base, self._mounts, self._pid = spec.run_dir, 0, 0
        self.cri: Cri | None = None

    @property
    def root(self) -> Path:
        return Path(f"/proc/{self._pid}/root")

    @property
    def runtime(self) -> Cri:
        assert self.cri is not None, "no runtime runs"
        return self.cri

    def inside(self, argv: Sequence[str]) -> list[str]:
        """To be run in the network namespace; all of it execs in place."""
        return ["nsenter", f"--mount=/proc/{self._pid}/ns/mnt", f"--wd={REPO}", "--", *argv]

    def run(self, argv: Sequence[str], *, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(self.inside(argv), stdin=stdin, netns=self.netns, check=check)

    def boot(self) -> None:
        """Network and files; no daemon yet."""
        add_namespace(self.spec.netns_name("node1"), _SYSCTLS)
        with links(self.spec.netns_name("node1")) as node1:
            node1.add_addresses("lo", f"{RESOLVER}/32")
        if not (self._base / "disk").exists():
            self._format(self._base / "disk")
        booted = self._base / "booted"
        booted.unlink(missing_ok=True)
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _MOUNTS, "sh", str(self._base)]
        child = self._children.start("node1.init", argv, self.netns, self._base / "init.log")
        await_ready(child, booted.exists, 10, "booted")
        self._pid = child.pid
        self._mounts = Path(f"/proc/{child.pid}/ns/mnt").stat().st_ino

    def _format(self, disk: Path) -> None:
        for name in ("etc/cni/net.d", "etc/containerd", "opt/cni/bin", "var/lib/cni"):
            (disk / name).mkdir(parents=True)
        for name in ("etc/cni", "etc/containerd", "opt/cni", "var/lib/cni"):
            os.setxattr(disk / name, "trusted.overlay.opaque", b"y")  # whatever this machine has there is not ours
        config = CONFIG.format(disk=self._base, pause=criimages.PAUSE)
        (disk / "etc/containerd/config.toml").write_text(config)
        for plugin in PLUGINS.iterdir():
            (disk / "opt/cni/bin" / plugin.name).symlink_to(plugin)

    def start_containerd(self) -> None:
        """Awaited until it answers and has the images."""
        path = self.root / _SOCKET
        argv = self.inside(["env", f"PATH={PATH}", "containerd"])  # it finds shim and runc there, too
        child = self._children.start("node1.containerd", argv, self.netns, self._base / "containerd.log")
        await_ready(child, lambda: _connectable(path), 20, "listening")
        self.cri = Cri(str(path))
        await_ready(child, self._answers, 20, "answering")
        if not self._has_images():
            archive = self._base / "images.tar"
            criimages.write(archive, Path(shutil.which("busybox", path=PATH) or ""))
            self.run(["env", f"PATH={PATH}", "ctr", "-n", "k8s.io", "images", "import", str(archive)])
            await_ready(child, self._has_images, 20, "in possession of the images")

    def _answers(self) -> bool:
        with contextlib.suppress(CriError):
            return bool(self.runtime.call("Version", seconds=5))
        return False

    def _has_images(self) -> bool:
        names = (criimages.PAUSE, criimages.BUSYBOX)
        return all(self.runtime.call("ImageStatus", [(1, [(1, name)])]).get(1) for name in names)

    def kill_containerd(self) -> None:
        """As a crash does: the shims and the containers live on."""
        self._forget_runtime()
        self._children.kill("node1.containerd")

    def _forget_runtime(self) -> None:
        if self.cri is not None:
            self.cri.close()
            self.cri = None

    def processes(self) -> list[int]:
        """Pids of all that runs there, containers included."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it ended meanwhile
                if entry.name.isdigit() and self._is_ours(entry):
                    found.append(int(entry.name))
        return found

    def _is_ours(self, process: Path) -> bool:
        if self._mounts and (process / "ns/mnt").stat().st_ino == self._mounts:
            return True
        return f":/{self.spec.prefix}/" in (process / "cgroup").read_text()

    def power_off(self) -> None:
        """At once, as a power failure: what was in memory is gone, namespaces and all of /run included."""
        self._forget_runtime()
        self.end_processes()
        for child in self._children.all():
            self._children.kill(child.name)
        remove_namespace(self.spec.netns_name("node1"))
        self._pid = self._mounts = 0
        remove_cgroups(self.spec.prefix)
        shutil.rmtree(self._base / "run", ignore_errors=True)

    def end_processes(self) -> None:
        """All of `processes`, by SIGKILL. Raises SluiceError."""
        deadline = time.monotonic() + 20
        while left := self.processes():
            for pid in left:
                end(pid, start_time(pid), 0)
            if time.monotonic() > deadline:
                raise SluiceError(f"processes {left} do not end")


def cgroups(prefix: str) -> list[Path]:
    """The directories of pods, of every hierarchy, innermost first."""
    found = []
    for top in (CGROUPS, *(path for path in CGROUPS.iterdir() if path.is_dir() and not path.is_symlink())):
        found += [Path(path) for path, _, _ in os.walk(top / prefix, topdown=False)]
    return found


def remove_cgroups(prefix: str, seconds: float = 10) -> None:
    """Raises SluiceError when processes are left in them."""
    deadline = time.monotonic() + seconds
    while found := cgroups(prefix):
        for path in found:
            with contextlib.suppress(OSError):  # busy for as long as its last process is dying
                path.rmdir()
        if time.monotonic() > deadline:
            raise SluiceError(f"cgroups could not be removed: {found[0]}")


def _connectable(path: Path) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as tried:
        tried.connect(str(path))
        return True
    return False


def check_programs() -> None:
    """Raises SluiceError with the packages that are missing."""
    missing = {name: package for name, package in _NEEDED.items() if shutil.which(name, path=PATH) is None}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise SluiceError(f"missing {', '.join(missing)}; on Debian or Ubuntu: apt-get install {packages}")
