# SPDX-License-Identifier: Apache-2.0
"""Virtual machines on a segment of their own: qemu without hardware's help, bridge and taps in a network namespace.

    <prefix>-lan: br0 192.168.56.1 ── tap1 ══ eth0: server 192.168.56.11
                                   ├─ tap2 ══ eth0: worker1 .12
                                   └─ tap3 ══ eth0: worker2 .13

Disks are overlays over one image (vagrant/vm/image), kernel and first root file system are beside it. Name and address
come by the kernel's command line, the key that may log in as a credential (SMBIOS), so the image holds no secret.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent.core.errors import SluiceError
from agent.kernel.exec import run
from agent.lab import nodes
from agent.lab.links import NETNS_DIR, NO_DAD, add_namespace, links, remove_namespace
from agent.lab.processes import Child, Children

REPO = Path(__file__).resolve().parents[2]
IMAGE = REPO / "build" / "vm"
NETWORK = "192.168.56"
NODES = {"server": 11, "worker1": 12, "worker2": 13}
MEMORY = 768  # MB
SECONDS = 600.0  # for a boot: emulated cores, and others use this machine too
# Not `max`: every feature that a kernel makes use of by drivers, self-tests or wider registers is slower when emulated.
_CPU = "Nehalem,+fsgsbase,-svm,-vmx"
_NEEDED = {"qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils", "ssh": "openssh-client"}


def lacking() -> str:
    """What has to be installed first, as the command that does; "" when nothing has."""
    packages = sorted({package for program, package in _NEEDED.items() if shutil.which(program) is None})
    return f"apt-get install --no-install-recommends {' '.join(packages)}" if packages else ""


class Machines:
    """`base` is a directory that goes away with them; `on` there is $GUIDE_ON of the guided script."""

    def __init__(self, prefix: str, base: Path) -> None:
        self.prefix, self.base = prefix, base
        self.lan = f"{prefix}-lan"
        self.children = Children(base / "processes")
        self.began = time.monotonic()

    def say(self, words: str) -> None:
        print(f"vm: {time.monotonic() - self.began:4.0f} s  {words}", flush=True)

    # --- the segment, and who may log in

    def network(self) -> None:
        add_namespace(self.lan, NO_DAD)
        with links(self.lan) as segment:
            segment.bridge("br0")
            segment.add_addresses("br0", f"{NETWORK}.1/24")
            for number, _ in enumerate(NODES, 1):
                segment.tap(f"tap{number}")
                segment.up(f"tap{number}", master="br0")
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.prefix, "-f", str(self.base / "key")])
        hosts = "".join(f"Host {name}\n  HostName {NETWORK}.{last}\n" for name, last in NODES.items())
        (self.base / "ssh").write_text(hosts + _SSH.format(base=self.base))
        on = self.base / "on"
        on.write_text(_ON.format(lan=self.lan, config=self.base / "ssh"))
        on.chmod(0o755)

    # --- machines

    def start(self, name: str) -> Child:
        disk = self.base / f"{name}.qcow2"
        if not disk.exists():
            base = str(IMAGE / "base.img")
            run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", str(disk)], seconds=60)
        return self.children.start(name, self._argv(name, disk), NETNS_DIR / self.lan, self.base / f"{name}.log")

    def _argv(self, name: str, disk: Path) -> list[str]:
        number = list(NODES).index(name) + 1
        key = base64.b64encode((self.base / "key.pub").read_bytes()).decode()
        kernel = (
            "root=LABEL=root rw console=ttyS0 quiet net.ifnames=0 mitigations=off nokaslr audit=0 tsc=reliable "
            f"systemd.hostname={name} ip={NETWORK}.{NODES[name]}:::255.255.255.0::eth0:none"
        )
        return [
            "qemu-system-x86_64", "-name", f"{self.prefix}-{name}", "-machine", "pc,accel=tcg,usb=off,vmport=off",
            "-cpu", _CPU, "-smp", "1", "-m", str(MEMORY), "-no-user-config", "-nodefaults", "-display", "none",
            "-serial", f"file:{self.base / name}.console", "-kernel", str(IMAGE / "vmlinuz"),
            "-initrd", str(IMAGE / "initrd.img"), "-append", kernel,
            "-drive", f"file={disk},if=virtio,cache=unsafe",
            "-netdev", f"tap,id=lan,ifname=tap{number},script=no,downscript=no",
            "-device", f"virtio-net-pci,netdev=lan,romfile=,mac=52:54:00:56:00:{NODES[name]}",
            "-device", "virtio-rng-pci",
            "-smbios", f"type=11,value=io.systemd.credential.binary:ssh.authorized_keys.root={key}",
        ]  # fmt: skip

    def await_login(self, name: str, seconds: float = SECONDS) -> None:
        """Until a command runs there. Raises SluiceError with the end of its console."""
        deadline = time.monotonic() + seconds
        while self.ask(name, "true", seconds=30).returncode:
            child = self.children.get(name)
            if child is None or not child.alive:
                raise SluiceError(f"{name} ended: {child.tail() if child else 'it was not started'}")
            if time.monotonic() > deadline:
                raise SluiceError(f"{name} cannot be logged in to after {seconds:.0f} s: {self.console(name)}")
            time.sleep(1)
        self.say(f"{name} has booted")

    def console(self, name: str) -> str:
        with contextlib.suppress(OSError):
            return " | ".join((self.base / f"{name}.console").read_text(errors="replace").splitlines()[-8:])
        return "its console is empty"

    # --- commands and files

    def ask(self, name: str, command: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """A shell command as root; its exit code is not looked at, 255 is ssh's own."""
        argv = [str(self.base / "on"), name, command]
        try:
            return subprocess.run(argv, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(argv, 124, "", f"no answer in {seconds:.0f} s")

    def sh(self, name: str, command: str, seconds: float = 300) -> str:
        """The same; its standard output. Raises SluiceError with all that it said."""
        done = self.ask(name, command, seconds)
        if done.returncode:
            raise SluiceError(f"{name}# {command}: exit {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def copy(self, name: str, paths: Sequence[Path], to: str) -> None:
        """Files and directories into the directory `to`, which is made."""
        words = [word for path in paths for word in ("-C", str(path.resolve().parent), path.name)]
        packed = subprocess.run(["tar", "-c", *words], check=True, capture_output=True).stdout
        argv = [str(self.base / "on"), name, f"mkdir -p {shlex.quote(to)} && tar -x -C {shlex.quote(to)}"]
        subprocess.run(argv, input=packed, check=True, capture_output=True, timeout=300)

    # --- the end

    def down(self) -> None:
        for child in self.children.all():
            self.children.kill(child.name)
        for pid in nodes.processes_inside([self.lan]):  # ssh, which keeps its connections
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        remove_namespace(self.lan)
        for name in NODES:
            (self.base / f"{name}.qcow2").unlink(missing_ok=True)


_SSH = """Host *
  User root
  IdentityFile {base}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  BatchMode yes
  ConnectTimeout 60
  ServerAliveInterval 10
  ServerAliveCountMax 6
  ControlMaster auto
  ControlPath {base}/to-%n
  ControlPersist yes
"""

_ON = """#!/bin/sh
# on NODE COMMAND...: a shell command as root on a machine of this lab. One connection for all: logging in is slow.
node=$1; shift
exec ip netns exec {lan} ssh -F {config} "$node" "$@"
"""


@contextlib.contextmanager
def machines(prefix: str, base: Path) -> Iterator[Machines]:
    """Three machines that have booted; nothing is on them yet but the image. Nothing of them is left afterwards."""
    made = Machines(prefix, base)
    try:
        made.network()
        for name in NODES:
            made.start(name)
        for name in NODES:
            made.await_login(name)
        yield made
    finally:
        made.down()
