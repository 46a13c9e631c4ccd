# SPDX-License-Identifier: Apache-2.0
"""The files of the tests' API server: a CA and a certificate by openssl, credentials as the kubelet lays them out."""

from __future__ import annotations

import secrets
import subprocess
from pathlib import Path

NAMES = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"


def authority(directory: Path) -> None:
    """ca.crt and ca.key, as kubeadm's: no key identifiers that VERIFY_X509_STRICT would want."""
    _openssl(
        directory, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-subj", "/CN=kubernetes", "-keyout", "ca.key", "-out", "ca.crt",
    )  # fmt: skip


def certificate(directory: Path) -> None:
    """server.crt and server.key of that CA, for localhost by name and by both addresses."""
    (directory / "names").write_text(NAMES + "\n")
    _openssl(
        directory, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj",
        "/CN=kube-apiserver", "-keyout", "server.key", "-out", "server.csr",
    )  # fmt: skip
    _openssl(
        directory, "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-days", "2",
        "-set_serial", str(secrets.randbits(60)), "-extfile", "names", "-out", "server.crt",
    )  # fmt: skip


def _openssl(directory: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True)


class Projected:
    """A projected volume: `token` and `ca.crt` are links through ..data, which is swapped for another directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        for name in ("token", "ca.crt"):
            (directory / name).symlink_to(f"..data/{name}")

    def write(self, token: str, authorities: str) -> None:
        """As the kubelet does it (pkg/volume/util/atomic_writer.go): all at once, for whoever looks."""
        new = self.directory / f"..{secrets.token_hex(4)}"
        new.mkdir()
        (new / "token").write_text(token)
        (new / "ca.crt").write_text(authorities)
        link = self.directory / "..data_tmp"
        link.symlink_to(new.name)
        old = self.directory / "..data"
        was = old.readlink().name if old.is_symlink() else ""
        link.rename(old)
        if was:
            for name in ("token", "ca.crt"):
                (self.directory / was / name).unlink()
            (self.directory / was).rmdir()
