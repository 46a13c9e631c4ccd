# SPDX-License-Identifier: Apache-2.0
"""The archive of tools/dist: the same bytes each time, all that a node needs, and a program that knows its version."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from support.rehearsalnodes import REPO

from agent import __version__

PREVIOUS = (REPO / "tools/previous").read_text().split()[0]


def made(folder: Path, *argv: str) -> Path:
    done = subprocess.run([str(REPO / "tools/dist"), *argv, str(folder)], capture_output=True, text=True, check=True)
    return Path(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("argv", [(), ("--ref", PREVIOUS)], ids=["now", "previous"])
def test_archive(tmp_path: Path, argv: tuple[str, ...]) -> None:
    archive = made(tmp_path / "a", *argv)
    version = archive.name.removeprefix("sluice-").removesuffix(".tar.gz")
    assert version.endswith(f"~{PREVIOUS[:7]}") if argv else version == __version__
    assert archive.read_bytes() == made(tmp_path / "b", *argv).read_bytes()
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
        names = {name.partition("/")[2] for name in opened.getnames()}
    for name in (
        "bin/sluice", "bin/sluice-cni", "agent/__main__.py", "agent/backends/ebpf/objects/connect.bpf.o",
        "systemd/sluice.service", "systemd/sluice-ztunnel.service", "systemd/sluice-ztunnel@.service",
        "guide/guide.sh", "node/pod", "provision/sluice.sh",
    ):  # fmt: skip
        assert name in names, name
    assert not [name for name in names if "__pycache__" in name]
    (tmp_path / "sluice").symlink_to(tmp_path / f"sluice-{version}/bin/sluice")
    environment = {"PATH": os.environ["PATH"], "SLUICE_PYTHON": sys.executable}
    said = subprocess.run([tmp_path / "sluice", "--version"], env=environment, capture_output=True, text=True, cwd=REPO)
    assert said.stdout == f"sluice {version}\n", said.stderr  # its own, not the checkout's


def test_words_on_what_cannot_be(tmp_path: Path) -> None:
    for argv in (["--ref", "no-such-commit", str(tmp_path)], []):
        done = subprocess.run([str(REPO / "tools/dist"), *argv], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("dist: ")
