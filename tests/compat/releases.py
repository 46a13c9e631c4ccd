# SPDX-License-Identifier: Apache-2.0
"""nft as other Debian releases ship it, with the C library of that release: downloaded by apt, never installed."""

from __future__ import annotations

import shutil
from pathlib import Path

from agent.kernel.exec import run

# nft 0.9.8, 1.0.6, 1.1.3 and the newest that there is.
SUITES = ("bullseye", "bookworm", "trixie", "sid")
_MIRROR = "http://deb.debian.org/debian"
_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
_CACHE = Path(__file__).parents[2] / "build" / "compat"


def nft(suite: str) -> list[str]:
    """The argument list that starts that release's nft. Raises CommandError when it cannot be had."""
    root = _CACHE / suite / "root"
    if not root.is_dir():
        _fetch(suite)
    # Not the link in lib64, which may be an absolute one and lead to this machine's own.
    loader = next(root.rglob("x86_64-linux-gnu/ld-linux-x86-64.so.2"))
    libraries = ":".join(sorted({str(path.parent) for path in root.rglob("*.so.*")}))
    return [str(loader), "--library-path", libraries, str(root / "usr/sbin/nft")]


def _fetch(suite: str) -> None:
    """A private apt: lists, status and cache of its own, so that this machine's packages stay as they are."""
    place = _CACHE / suite
    shutil.rmtree(place, ignore_errors=True)
    for name in ("lists/partial", "cache/archives/partial", "unpacked"):
        (place / name).mkdir(parents=True)
    (place / "status").touch()
    (place / "sources.list").write_text(f"deb [arch=amd64 signed-by={_KEYS}] {_MIRROR} {suite} main\n")
    options = {
        "Dir::Etc::sourcelist": place / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::parts": "/dev/null",
        "Dir::Etc::main": "/dev/null",
        "Dir::State::lists": place / "lists",
        "Dir::State::status": place / "status",
        "Dir::Cache": place / "cache",
        "APT::Architecture": "amd64",
        "Acquire::Languages": "none",
    }
    apt = ["apt-get", "-qq", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    run([*apt, "update"], seconds=300)
    run([*apt, "-y", "--no-install-recommends", "--download-only", "install", "nftables"], seconds=300)
    for package in sorted((place / "cache/archives").glob("*.deb")):
        run(["dpkg-deb", "-x", str(package), str(place / "unpacked")])
    shutil.rmtree(place / "lists")
    shutil.rmtree(place / "cache")
    (place / "unpacked").rename(place / "root")  # last: what is there is whole
