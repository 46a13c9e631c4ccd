# SPDX-License-Identifier: Apache-2.0
"""The built image, and containers of it run by runc as a kubelet with containerd would have them run.

The pod's spec is the rendered chart's; "the host" is a directory and namespaces of the test's. What containerd's CRI
plugin adds by itself is in `_config`: masked and read-only paths, a read-only /sys, the mounts below /dev.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMAGE = Path(os.environ.get("SLUICE_IMAGE_DIR", ROOT / "build/image")) / "sluice.oci.tar"
_SECCOMP = Path("/usr/share/containers/seccomp.json")  # golang-github-containers-common, which buildah depends on
# containerd, oci.defaultUnixSpec (pkg/oci/spec.go).
_MASKED = ("/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
           "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware")  # fmt: skip
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_PROPAGATION = {"HostToContainer": "rslave", "Bidirectional": "rshared", "None": "rprivate"}


def lacking() -> str:
    """Why there is no image of these sources; empty when there is one."""
    build = ROOT / "deploy/image/build"
    mine = subprocess.run([build, "--sources"], capture_output=True, text=True, check=True, timeout=60).stdout
    noted = IMAGE.with_name("sources")
    if not (IMAGE.exists() and noted.exists() and noted.read_text() == mine):
        return f"no image of these sources in {IMAGE.parent}; run deploy/image/build first"
    return "" if shutil.which("runc") else "runc is not installed"


def unpack(archive: Path, into: Path) -> Mapping[str, Any]:
    """The root file system of an OCI archive with one manifest; returns the image's config."""
    with tarfile.open(archive) as tar:

        def blob(digest: str) -> Any:
            return tar.extractfile("blobs/" + digest.replace(":", "/"))

        manifest = json.load(blob(json.load(tar.extractfile("index.json"))["manifests"][0]["digest"]))
        for layer in manifest["layers"]:
            with tarfile.open(fileobj=blob(layer["digest"])) as files:
                files.extractall(into, filter="fully_trusted")
        config: Mapping[str, Any] = json.load(blob(manifest["config"]["digest"]))["config"]
    return config


def seccomp(capabilities: Sequence[str]) -> Mapping[str, Any] | None:
    """RuntimeDefault: the profile that containers/common ships (Moby's), for these capabilities, as runc wants it."""
    if not _SECCOMP.exists():
        return None
    profile, held = json.loads(_SECCOMP.read_text()), set(capabilities)

    def applies(rule: Mapping[str, Any]) -> bool:
        within, without = rule.get("includes") or {}, rule.get("excludes") or {}
        if without.get("caps") and held & set(without["caps"]):
            return False
        here = "amd64" if os.uname().machine == "x86_64" else "arm64"
        if here in without.get("arches", ()) or (within.get("arches") and here not in within["arches"]):
            return False
        return not within.get("caps") or bool(held & set(within["caps"]))

    rules = [rule for rule in profile["syscalls"] if applies(rule)]
    keys = ("names", "action", "args", "errnoRet")
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile.get("defaultErrnoRet", 1),
        "architectures": ["SCMP_ARCH_X86_64" if os.uname().machine == "x86_64" else "SCMP_ARCH_AARCH64"],
        "syscalls": [{key: rule[key] for key in keys if rule.get(key) is not None} for rule in rules],
    }


def cgroup2() -> Path | None:
    """Where the machine has cgroups of version 2 mounted."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return next((Path(one[1]) for one in mounts if one[2] == "cgroup2"), None)


@dataclass(frozen=True, slots=True)
class Host:
    """What is the node's for one test: its network and process id namespaces, and a directory for each hostPath.

    The machine's own are never taken: `sluice uncapture --all` looks at every process that it sees.
    """

    netns: str
    pidns: str
    inner: str  # a namespace of process ids below that one, for a pod without hostPID
    place: Callable[[str], str]


class Container:
    """One container of a pod spec, by default its only one. `capabilities` and `args` replace the chart's."""

    def __init__(
        self,
        name: str,
        bundle: Path,
        rootfs: Path,
        pod: Mapping[str, Any],
        host: Host,
        image: Mapping[str, Any],
        *,
        container: Mapping[str, Any] | None = None,
        capabilities: Sequence[str] | None = None,
        args: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        account: Path | None = None,
        confined: bool = True,
    ) -> None:
        self.name, self.bundle = name, bundle
        spec = pod["containers"][0] if container is None else container
        words = [
            *(spec.get("command") or image["Entrypoint"]),
            *(spec.get("args", image["Cmd"]) if args is None else args),
        ]
        given = {one["name"]: one["value"] for one in spec.get("env", ()) if "value" in one} | dict(env or {})
        added = spec["securityContext"]["capabilities"]["add"] if capabilities is None else capabilities
        held = [f"CAP_{one}" for one in added]
        bundle.mkdir(parents=True)
        variables = [*image["Env"], *(f"{key}={value}" for key, value in given.items())]
        config = _config(words, variables, held, rootfs, pod, host)
        config["root"]["readonly"] = spec["securityContext"]["readOnlyRootFilesystem"]
        config["mounts"] += _mounts(spec.get("volumeMounts", ()), pod.get("volumes", ()), host)
        if account:  # what the kubelet adds for the service account
            config["mounts"].append(_bind(_ACCOUNT, str(account), "rprivate", read_only=True))
        config["linux"]["cgroupsPath"] = f"/{name}"
        if confined and (profile := seccomp(held)):
            config["linux"]["seccomp"] = profile
        (bundle / "config.json").write_text(json.dumps(config))
        self._state = bundle / "state"
        self.cgroup = cgroups / name if (cgroups := cgroup2()) and cgroups.name == "unified" else None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        argv = [*self._runc(), "run", "--bundle", str(self.bundle), self.name]
        nothing = subprocess.DEVNULL
        with (self.bundle / "log").open("wb") as log:
            self._process = subprocess.Popen(
                argv, stdin=nothing, stdout=log, stderr=log, start_new_session=True, preexec_fn=self._enter
            )

    def _enter(self) -> None:
        """A cgroup of version 2 of its own, which runc does not make where version 1 is there too."""
        if self.cgroup:
            self.cgroup.mkdir()
            (self.cgroup / "cgroup.procs").write_text(str(os.getpid()))

    def run(self, seconds: float = 60) -> int:
        """To its end; returns its exit code."""
        self.start()
        assert self._process
        return self._process.wait(seconds)

    def exec(self, *argv: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Another process in it, as kubectl exec has it."""
        return subprocess.run(
            [*self._runc(), "exec", self.name, *argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def exited(self) -> int | None:
        return self._process.poll() if self._process else None

    def wait_for(self, what: Callable[[], bool], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert self.exited() is None, f"{self.name} ended:\n{self.log()}"
            assert time.monotonic() < end, f"{self.name}: not in {seconds} s:\n{self.log()}"
            time.sleep(0.05)

    def log(self) -> str:
        return (self.bundle / "log").read_text(errors="replace")

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Signals its first process and waits; returns its exit code."""
        assert self._process
        subprocess.run([*self._runc(), "kill", self.name, str(number)], capture_output=True, timeout=20)
        return self._process.wait(seconds)

    def remove(self) -> None:
        """However it went: nothing of it is left."""
        subprocess.run([*self._runc(), "delete", "--force", self.name], capture_output=True, timeout=20)
        if self._process:
            self._process.wait(20)
        shutil.rmtree(self.bundle, ignore_errors=True)
        if self.cgroup and self.cgroup.is_dir():
            self.cgroup.rmdir()

    def _runc(self) -> list[str]:
        return ["runc", "--root", str(self._state)]


def _config(
    args: Sequence[str], env: Sequence[str], held: Sequence[str], rootfs: Path, pod: Mapping[str, Any], host: Host
) -> dict[str, Any]:
    namespaces: list[dict[str, str]] = [{"type": kind} for kind in ("mount", "ipc")]
    namespaces.append({"type": "pid", "path": host.pidns if pod.get("hostPID") else host.inner})
    assert pod.get("hostNetwork"), "the chart's pods have the node's network"
    namespaces.append({"type": "network", "path": host.netns})
    sets = {kind: list(held) for kind in ("bounding", "effective", "permitted")}
    small = ["nosuid", "noexec", "nodev"]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": list(env),
            "cwd": "/",
            "capabilities": sets,
        },
        "root": {"path": str(rootfs), "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": small},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*small, "mode=1777"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*small, "ro"]},
        ],
        "linux": {
            "namespaces": namespaces,
            "rootfsPropagation": "rslave",
            "maskedPaths": list(_MASKED),
            "readonlyPaths": list(_READ_ONLY),
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        },
    }


def _mounts(
    mounts: Sequence[Mapping[str, Any]], volumes: Sequence[Mapping[str, Any]], host: Host
) -> list[dict[str, Any]]:
    """By their depth, as containerd orders them."""
    paths = {}
    for one in volumes:
        if "hostPath" in one:
            paths[one["name"]] = host.place(one["hostPath"]["path"])
            if one["hostPath"].get("type") == "DirectoryOrCreate":
                Path(paths[one["name"]]).mkdir(parents=True, exist_ok=True)
        else:
            paths[one["name"]] = host.place(f"volume:{one['name']}")
    made = []
    for each in sorted(mounts, key=lambda one: one["mountPath"].rstrip("/").count("/")):
        propagation = _PROPAGATION[each.get("mountPropagation", "None")]
        made.append(_bind(each["mountPath"], paths[each["name"]], propagation, read_only=each.get("readOnly", False)))
    return made


def _bind(at: str, source: str, propagation: str, *, read_only: bool) -> dict[str, Any]:
    options = ["rbind", propagation, "ro" if read_only else "rw"]
    return {"destination": at, "type": "bind", "source": source, "options": options}
