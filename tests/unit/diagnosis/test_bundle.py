# SPDX-License-Identifier: Apache-2.0
"""A bundle: redacted at its only door, bounded, the same bytes for the same contents, root's alone."""

from __future__ import annotations

import io
import stat
import tarfile
from pathlib import Path

import pytest

from agent.core.errors import SluiceError
from agent.diagnosis.bundle import MOST, Bundle, safe


def made(salt: str = "") -> Bundle:
    bundle = Bundle("sluice-report-n1", salt)
    bundle.text("log.txt", "token: hunter2\nfine, from 10.0.0.7\n")
    bundle.value("settings.json", {"password": "hunter2", "address": "10.0.0.7"})
    bundle.lacks("host/nft.txt", "nft: not installed;\n password=hunter2")
    return bundle


def read(path: Path) -> dict[str, str]:
    with tarfile.open(path) as tar:
        found = {one.name: tar.extractfile(one) for one in tar.getmembers()}
        return {name: file.read().decode() for name, file in found.items() if file}


def test_it_is_roots_alone_and_the_same_each_time(tmp_path: Path) -> None:
    sizes = [made().write(tmp_path / name) for name in ("a.tar.gz", "b.tar.gz")]
    one, other = (tmp_path / name for name in ("a.tar.gz", "b.tar.gz"))
    assert one.read_bytes() == other.read_bytes()
    assert sizes == [one.stat().st_size] * 2
    assert stat.S_IMODE(one.stat().st_mode) == 0o600
    with tarfile.open(one) as tar:
        names = [member.name for member in tar.getmembers()]
        assert names == sorted(names)
        assert {(member.mtime, member.uid, member.mode) for member in tar.getmembers()} == {(0, 0, 0o600)}


def test_no_secret_is_in_any_file_also_not_in_the_manifest(tmp_path: Path) -> None:
    made().write(tmp_path / "a.tar.gz")
    held = read(tmp_path / "a.tar.gz")
    assert not [name for name, words in held.items() if "hunter2" in words]
    assert "fine, from 10.0.0.7" in held["sluice-report-n1/log.txt"]
    manifest = held["sluice-report-n1/MANIFEST"]
    assert "log.txt" in manifest and "host/nft.txt: nft: not installed" in manifest


def test_addresses_are_the_same_word_in_all_files(tmp_path: Path) -> None:
    made("salt").write(tmp_path / "a.tar.gz")
    held = read(tmp_path / "a.tar.gz")
    assert not [name for name, words in held.items() if "10.0.0.7" in words]
    word = held["sluice-report-n1/log.txt"].split()[-1]
    assert word.startswith("ipv4-") and word in held["sluice-report-n1/settings.json"]


def test_a_long_file_keeps_its_end_and_says_so() -> None:
    bundle = Bundle("r")
    bundle.text("log.txt", "".join(f"line {number}\n" for number in range(300_000)))
    assert len(bundle.files["log.txt"]) <= MOST
    assert bundle.files["log.txt"].startswith(b"line ")
    assert bundle.files["log.txt"].endswith(b"line 299999\n")
    assert "log.txt" in bundle.manifest() and "the end of" in bundle.manifest()


def test_a_key_that_is_cut_in_two_does_not_survive() -> None:
    bundle = Bundle("r")
    body = "".join(f"hunter2{number:06}\n" for number in range(5 * MOST // 14))
    bundle.text("log.txt", f"-----BEGIN PRIVATE KEY-----\n{body}-----END PRIVATE KEY-----\nend\n")
    assert b"hunter2" not in bundle.files["log.txt"]
    assert b"end\n" in bundle.files["log.txt"]


def test_a_value_that_is_too_long_is_cut_as_a_text() -> None:
    bundle = Bundle("r")
    bundle.value("pods.json", [{"name": f"pod-{number}", "token": "hunter2"} for number in range(60_000)])
    assert len(bundle.files["pods.json"]) <= MOST
    assert b"hunter2" not in bundle.files["pods.json"]


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    place = tmp_path / "a.tar.gz"
    place.write_bytes(b"mine")
    with pytest.raises(SluiceError, match="File exists; give another --file"):
        made().write(place)
    assert place.read_bytes() == b"mine"
    with pytest.raises(SluiceError, match="No such file"):
        made().write(tmp_path / "missing" / "a.tar.gz")


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", ".hidden", "", "x" * 500, "näme"])
def test_names_lead_nowhere_else(name: str) -> None:
    shown = safe(name)
    assert shown and "/" not in shown and not shown.startswith(".") and len(shown) <= 120


def test_nothing_is_lost_on_the_way() -> None:
    bundle = made()
    with tarfile.open(fileobj=io.BytesIO(bundle._packed())) as packed:
        assert {name.removeprefix("sluice-report-n1/") for name in packed.getnames()} == {*bundle.files, "MANIFEST"}
