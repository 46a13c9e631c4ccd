# SPDX-License-Identifier: Apache-2.0
"""Files that are swapped while we run."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import apiserver_files
from support.apiserver_files import Projected

from agent.core.errors import KubeError
from agent.sources.kube.access import Access

SERVER = "https://10.96.0.1:443"


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    found = []
    for at in range(2):
        directory = tmp_path_factory.mktemp(f"authority{at}")
        apiserver_files.authority(directory)
        found.append((directory / "ca.crt").read_text())
    return found[0], found[1]


def access(directory: Path, server: str = SERVER) -> Access:
    return Access(server, str(directory / "token"), str(directory / "ca.crt"))


def test_p14_what_the_kubelet_swaps_is_read_again(tmp_path: Path, authorities: tuple[str, str]) -> None:
    """Token and CA, by the symbolic link that both go through."""
    volume = Projected(tmp_path / "account")
    volume.write("one\n", authorities[0])
    at = access(volume.directory)
    assert at.token() == "one"
    first = at.context()
    assert at.context() is first and first is not None and first.verify_mode == 2 and first.check_hostname
    volume.write("two", authorities[1])
    assert at.token() == "two" and at.context() is not first
    assert len(at.context().get_ca_certs()) == 1  # type: ignore[union-attr]


def test_p14_files_that_cannot_be_used_leave_the_older_ones(tmp_path: Path, authorities: tuple[str, str]) -> None:
    """Away, empty or damaged: whatever happens to the volume, what worked goes on working."""
    (tmp_path / "token").write_text("one")
    (tmp_path / "ca.crt").write_text(authorities[0])
    at = access(tmp_path)
    context = at.context()
    assert at.token() == "one"
    for token in ("", "two words", "x" * 70_000, "\u00fcml\u00e4ut"):
        (tmp_path / "token").write_text(token)
        (tmp_path / "ca.crt").write_text(token)
        assert at.token() == "one" and at.context() is context
    (tmp_path / "token").unlink()
    (tmp_path / "ca.crt").unlink()
    assert at.token() == "one" and at.context() is context
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    assert at.token() == "one"


def test_without_files_it_says_which_setting(tmp_path: Path) -> None:
    """Every time, until they are there."""
    at = access(tmp_path)
    for _ in range(2):
        with pytest.raises(KubeError, match=r"token: is not there or empty; check kube_token_file"):
            at.token()
        with pytest.raises(KubeError, match=r"ca\.crt: is not there or empty; check kube_ca_file"):
            at.context()
    (tmp_path / "ca.crt").write_text("no certificate")
    for _ in range(2):
        with pytest.raises(KubeError, match="check kube_ca_file"):
            at.context()


def test_a_refused_token_is_read_again_though_the_file_looks_the_same(tmp_path: Path) -> None:
    """A file system may give a new file the inode, time and size of the old one."""
    (tmp_path / "token").write_text("one")
    at = access(tmp_path)
    assert at.token() == "one"
    at.refused()
    assert at.token() == "one"


def test_nothing_secret_goes_out_without_tls(tmp_path: Path) -> None:
    """http is for `kubectl proxy` and tests."""
    (tmp_path / "token").write_text("one")
    at = access(tmp_path, "http://127.0.0.1:8001")
    assert (at.token(), at.context(), at.port, at.authority) == ("", None, 8001, "127.0.0.1:8001")


@pytest.mark.parametrize(
    ("server", "host", "port"),
    [
        ("https://[fd00::1]:6443", "fd00::1", 6443),
        ("https://kube.local", "kube.local", 443),
        (SERVER, "10.96.0.1", 443),
    ],
)
def test_servers(tmp_path: Path, server: str, host: str, port: int) -> None:
    at = access(tmp_path, server)
    assert (at.host, at.port, at.secure) == (host, port, True)


@pytest.mark.parametrize("server", ["", "10.0.0.1:443", "ftp://x", "https://", "https://x:99999999", "https://[::1"])
def test_what_is_no_server(tmp_path: Path, server: str) -> None:
    with pytest.raises(KubeError, match="check kube_server"):
        access(tmp_path, server)
