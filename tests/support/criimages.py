# SPDX-License-Identifier: Apache-2.0
"""Two images made of Debian's static busybox, as one archive in the layout of `docker save`: no registry, no daemon."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from platform import machine

PAUSE, BUSYBOX = "localhost/pause:local", "localhost/busybox:local"
# httpd and nslookup are busybox's; what a shell needs besides is called by these names.
APPLETS = ("sh", "cat", "httpd", "ls", "nc", "nslookup", "sleep", "timeout", "wget")
_DIRECTORIES = ("bin", "dev", "etc", "proc", "sys", "tmp", "www")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def write(path: Path, busybox: Path) -> None:
    """Both images; a runtime names them as above. `busybox` is the static program."""
    layer = _layer(busybox.read_bytes())
    digest = hashlib.sha256(layer).hexdigest()
    pause = _config(["/bin/busybox", "sleep", "2147483647"], digest)
    shell = _config(["/bin/sh"], digest)
    files: dict[str, bytes] = {f"{digest}/layer.tar": layer}
    manifest = []
    for name, config in ((PAUSE, pause), (BUSYBOX, shell)):
        file = f"{hashlib.sha256(config).hexdigest()}.json"
        files[file] = config
        manifest.append({"Config": file, "RepoTags": [name], "Layers": [f"{digest}/layer.tar"]})
    path.write_bytes(_tar({**files, "manifest.json": json.dumps(manifest).encode()}))


def _config(entrypoint: Sequence[str], digest: str) -> bytes:
    value = {
        "architecture": _ARCHITECTURES.get(machine(), machine()),
        "os": "linux",
        "config": {"Entrypoint": list(entrypoint), "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        "history": [{"created_by": "sluice's tests"}],
    }
    return json.dumps(value).encode()


def _layer(busybox: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in _DIRECTORIES:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            archive.addfile(entry)
        _add(archive, "bin/busybox", busybox, 0o755)
        _add(archive, "www/index.html", b"hello\n", 0o644)
        for name in APPLETS:
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "/bin/busybox"
            archive.addfile(link)
    return out.getvalue()


def _tar(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            _add(archive, name, data, 0o644)
    return out.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    archive.addfile(entry, io.BytesIO(data))
