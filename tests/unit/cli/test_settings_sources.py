# SPDX-License-Identifier: Apache-2.0
"""Settings as a user gives them: file, environment, flags, each mistake with its place."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from agent.cli import settings_sources
from agent.core.errors import SettingsError
from agent.core.settings import DECLARED, Settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("SLUICE_")]:
        monkeypatch.delenv(name)


def load(*argv: str) -> Settings:
    parser = argparse.ArgumentParser()
    settings_sources.add_options(parser)
    return settings_sources.load(parser.parse_args(argv))


def test_nothing_given() -> None:
    assert load() == Settings()


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sluice.yaml"
    file.write_text("backend: nftables\nnode_name: file\nverify_seconds: 7\nexclude_namespaces: [a, b]\n")
    monkeypatch.setenv("SLUICE_NODE_NAME", "environment")
    monkeypatch.setenv("SLUICE_BACKEND", "iptables")
    monkeypatch.setenv("SLUICE_CONFIG", str(file))
    got = load("--backend", "auto", "--exclude-namespaces", "")
    assert (got.backend, got.node_name, got.verify_seconds) == ("auto", "environment", 7.0)
    assert got.exclude_namespaces == ()
    other = tmp_path / "other.yaml"
    other.write_text("# nothing\n")
    assert load("--config", str(other)).verify_seconds == 30.0


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("node_name: a\nbackned: b\n", ":2: unknown setting 'backned'"),
        ("\nbackend: x\n", ":2: backend: 'x' is not one of"),
        ("ipv6: 1\n", ":1: ipv6: 1 is not true or false"),
        ("node_name:\n", ":1: node_name: None is not text"),
        ("1: a\n", ":1: unknown setting '1'"),
        ("true: a\n", ":1: unknown setting 'true'"),
        ("<<: {backend: auto}\n", ":1: unknown setting '<<'"),
        ("- a\n", ":1: not a mapping"),
        ("a: [\n", ":2: not YAML"),
        ("node_name: 2024-99-99\n", ": not YAML"),
        ("[" * 5000, ": not YAML"),
        ("a: b\n---\nc: d\n", ":2: not YAML"),
    ],
)
def test_mistakes_in_the_file_have_its_line(tmp_path: Path, content: str, place: str) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(content)
    with pytest.raises(SettingsError) as error:
        load("--config", str(file))
    assert str(error.value).startswith(f"{file}{place}")


def test_mistakes_in_environment_and_flags_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^--verify-seconds: verify_seconds: 'x' is not a number"):
        load("--verify-seconds", "x")
    with pytest.raises(SettingsError, match="No such file"):
        load("--config", str(tmp_path / "none"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="binary: "):
        load("--config", str(tmp_path / "binary"))
    monkeypatch.setenv("SLUICE_BACKNED", "x")
    with pytest.raises(SettingsError, match=r"^\$SLUICE_BACKNED: unknown setting"):
        load()


def test_where_settings_come_from_and_what_their_flags_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sluice.yaml"
    file.write_text("backend: nftables\nipv6: false\nnode_name: x\n")
    monkeypatch.setenv("SLUICE_IPV6", "true")
    parser = argparse.ArgumentParser()
    settings_sources.add_options(parser)
    args = parser.parse_args(["--config", str(file), "--backend", "ebpf"])
    assert settings_sources.origins(args) == {"backend": "--backend", "ipv6": "$SLUICE_IPV6", "node_name": f"{file}:3"}
    takes = {
        key: DECLARED[key].kind.takes for key in ("ipv6", "offline_pods", "run_dir", "exempt_pods", "verify_seconds")
    }
    assert takes == {
        "ipv6": "true|false", "offline_pods": "by-namespace|refuse", "run_dir": "PATH", "exempt_pods": "LIST",
        "verify_seconds": "SECONDS",
    }  # fmt: skip
