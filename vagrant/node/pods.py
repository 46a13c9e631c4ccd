# SPDX-License-Identifier: Apache-2.0
"""`pod`: runs pods on a node without a kubelet, as the kubelet would have its runtime run them (CRI v1).

crictl is in no Debian release; this is as much of it as a lab needs, and one command where crictl needs five. The image
is busybox, written here. A pod's labels and annotations are what the CNI plugins are told.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import images
from cri import SOCKET, Cri, CriError, Fields, container_config, decode, sandbox_config

CGROUP = os.environ.get("POD_CGROUP", "/kubepods/besteffort")
RESOLVER = os.environ.get("POD_RESOLVER", "192.0.2.53")
ENROLLED = {"istio.io/dataplane-mode": "ambient"}
READY, RUNNING = 0, 1  # PodSandboxState, ContainerState of cri-api


@dataclass(frozen=True)
class Row:
    """One sandbox as the runtime lists it."""

    id: str
    namespace: str
    name: str
    uid: str
    ready: bool
    annotations: dict[str, str]

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


class Pods:
    def __init__(self) -> None:
        self.cri = Cri(os.environ.get("POD_RUNTIME", SOCKET))

    def rows(self) -> Iterator[Row]:
        for item in self.cri.call("ListPodSandbox").get(1, []):
            row = decode(item)
            metadata = {number: words[0].decode() for number, words in decode(row[2][0]).items() if number < 4}
            pairs = (decode(each) for each in row.get(6, []))
            annotations = {pair[1][0].decode(): pair.get(2, [b""])[0].decode() for pair in pairs}
            state = row.get(3, [READY])[0]
            yield Row(row[1][0].decode(), metadata[3], metadata[1], metadata[2], state == READY, annotations)

    def one(self, key: str) -> Row:
        found = [row for row in self.rows() if row.ready and row.key == key]
        if not found:
            raise CriError(f"no pod {key} runs here; `pod list` has those that do")
        return found[0]

    def ip(self, row: Row) -> str:
        status = decode(self.cri.call("PodSandboxStatus", [(1, row.id)])[1][0])
        return decode(status.get(5, [b""])[0]).get(1, [b""])[0].decode()

    def container(self, row: Row) -> str:
        for item in self.cri.call("ListContainers").get(1, []):
            each = decode(item)
            if each[2][0].decode() == row.id and each.get(6, [0])[0] == RUNNING:
                return str(each[1][0].decode())
        raise CriError(f"the container of {row.key} does not run")

    def run(self, key: str, argv: list[str], given: dict[str, dict[str, str]], seconds: float) -> str:
        """Tried until it can be made or the time is over, as a kubelet does: a refusal of a CNI plugin may pass."""
        self.images()
        if any(row.ready and row.key == key for row in self.rows()):
            raise CriError(f"{key} runs already; pod stop {key}")
        namespace, _, name = key.partition("/")
        uid, deadline, attempt = str(uuid.uuid4()), time.monotonic() + seconds, 0
        while True:
            config = sandbox_config(
                namespace, name, uid, CGROUP, attempt=attempt, resolver=RESOLVER, **given
            )
            try:
                made = self.cri.call("RunPodSandbox", [(1, config)])[1][0].decode()
                break
            except CriError as error:
                if time.monotonic() > deadline:
                    raise
                if attempt == 0:
                    print(f"pod: {error}; trying again", file=sys.stderr)
                attempt += 1
                time.sleep(1)
        self._start(made, argv, config)
        return self.ip(self.one(key))

    def _start(self, sandbox: str, argv: list[str], config: Fields) -> None:
        made = container_config("main", images.BUSYBOX, argv)
        container = self.cri.call("CreateContainer", [(1, sandbox), (2, made), (3, config)])[1][0].decode()
        self.cri.call("StartContainer", [(1, container)])

    def execute(self, key: str, argv: list[str], seconds: int) -> int:
        fields = [(1, self.container(self.one(key))), *((2, word) for word in argv), (3, seconds)]
        answer = self.cri.call("ExecSync", fields, seconds + 5)
        sys.stdout.write(answer.get(1, [b""])[0].decode(errors="replace"))
        sys.stderr.write(answer.get(2, [b""])[0].decode(errors="replace"))
        return int(answer.get(3, [0])[0])

    def stop(self, key: str) -> None:
        """Also of a sandbox that the runtime only remembers, as after a reboot; `--all` are all of them."""
        rows = [row for row in self.rows() if key in (row.key, "--all")]
        if not rows and key != "--all":
            raise CriError(f"no pod {key}; `pod list` has those that there are")
        for row in rows:
            self.cri.call("StopPodSandbox", [(1, row.id)])
            self.cri.call("RemovePodSandbox", [(1, row.id)])
            for path in Path("/sys/fs/cgroup").glob(f"**{CGROUP}/pod{row.uid}"):
                path.rmdir()

    def networks(self) -> str:
        """The CNI configurations that the runtime has loaded, as it tells them (JSON)."""
        for entry in map(decode, self.cri.call("Status", [(1, 1)])[2]):
            if entry[1] == [b"cniconfig"]:
                return str(entry[2][0].decode())
        return ""

    def images(self) -> None:
        """Pause and busybox, once."""
        names = (images.PAUSE, images.BUSYBOX)
        if all(self.cri.call("ImageStatus", [(1, [(1, name)])]).get(1) for name in names):
            return
        busybox = shutil.which("busybox")
        if busybox is None:
            raise CriError("busybox is missing; apt-get install busybox-static")
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder, "images.tar")
            images.write(archive, Path(busybox))
            subprocess.run(["ctr", "-n", "k8s.io", "images", "import", str(archive)], check=True, capture_output=True)
        deadline = time.monotonic() + 30  # CRI learns of what ctr did by an event
        while not all(self.cri.call("ImageStatus", [(1, [(1, name)])]).get(1) for name in names):
            if time.monotonic() > deadline:
                raise CriError("the runtime does not show the images that were imported")
            time.sleep(0.05)


def _pair(text: str) -> tuple[str, str]:
    key, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: KEY=VALUE is needed")
    return key, value


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="pod", description="Pods on this node, made by its container runtime over CRI.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="make a pod with one busybox container; prints its address")
    run.add_argument("key", metavar="NAMESPACE/NAME")
    run.add_argument("--enrolled", action="store_true", help="with the annotation istio.io/dataplane-mode=ambient")
    run.add_argument("--label", type=_pair, action="append", default=[], metavar="KEY=VALUE")
    run.add_argument("--annotation", type=_pair, action="append", default=[], metavar="KEY=VALUE")
    run.add_argument("--seconds", type=float, default=30, help="for how long to try (default: %(default)g)")
    execute = commands.add_parser("exec", help="run a command in a pod's container")
    execute.add_argument("key", metavar="NAMESPACE/NAME")
    execute.add_argument("--seconds", type=int, default=30)
    for each in (run, execute):
        each.add_argument("argv", nargs="*", metavar="-- COMMAND")
    for name, words in (("stop", "end a pod; or --all"), ("ip", "print a pod's address")):
        commands.add_parser(name, help=words).add_argument("key", metavar="NAMESPACE/NAME")
    commands.add_parser("list", help="the pods of this node")
    commands.add_parser("networks", help="the CNI configurations that the runtime has loaded")
    commands.add_parser("images", help="give the runtime its two images, if it has not")
    return top


def main() -> int:
    words = sys.argv[1:]
    argv: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, argv = words[:at], words[at + 1 :]
    if words == ["stop", "--all"]:
        words = ["stop", "--", "--all"]
    args = _parser().parse_args(words)
    pods = Pods()
    try:
        match args.command:
            case "run":
                annotations = {**(ENROLLED if args.enrolled else {}), **dict(args.annotation)}
                given = {"labels": dict(args.label), "annotations": annotations}
                print(pods.run(args.key, argv or ["sleep", "2147483647"], given, args.seconds))
            case "exec":
                return pods.execute(args.key, argv, args.seconds)
            case "stop":
                pods.stop(args.key)
            case "ip":
                print(pods.ip(pods.one(args.key)))
            case "networks":
                print(pods.networks())
            case "images":
                pods.images()
            case "list":
                for row in sorted(pods.rows(), key=lambda row: row.key):
                    mode = row.annotations.get("istio.io/dataplane-mode", "-")
                    print(f"{row.key:24} {'ready' if row.ready else 'ended':6} {pods.ip(row):16} {mode}")
    except (CriError, OSError, subprocess.CalledProcessError) as error:
        print(f"pod: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
