# SPDX-License-Identifier: Apache-2.0
"""`sluice install` and `sluice uninstall` on a node's files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from support.installing import CALICO, Node, text, types

from agent.cli import install
from agent.core.errors import SluiceError
from agent.kernel.unix_socket import claim


def run(node: Node, *words: str) -> int:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    install.register(commands)
    where = ["--host-root", str(node.root), "--cni-plugin", str(node.source), "--run-dir", str(node.root / "run")]
    # Given, or this machine's own runtime would be asked.
    where += ["--cni-conf-dir", "/etc/cni/net.d", "--cni-bin-dir", "/opt/cni/bin"]
    args = parser.parse_args([*words, *where])
    code: int = args.run(args)
    return code


def test_install_check_install_uninstall(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.write("10-calico.conflist", text(CALICO))
    before = node.snapshot()
    assert run(node, "install", "--check") == 1
    assert node.snapshot() == before
    assert "To do:" in capsys.readouterr().out
    assert run(node, "install", "-o", "json") == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["installed"], value["mode"], value["file"]) == (True, "own", "02-sluice.conflist")
    assert value["plugins"] == {"directory": "/opt/cni/bin", "reason": "setting cni_bin_dir"}
    assert types(node.first()) == ["calico", "portmap", "sluice-cni"]
    assert run(node, "install", "--check") == 0
    assert run(node, "uninstall", "--dry-run", "--binary", "remove") == 0
    assert capsys.readouterr().out.count("would be done: ") == 2
    assert types(node.first())[-1] == "sluice-cni"
    assert run(node, "uninstall", "--binary", "remove") == 0
    assert node.snapshot() == before
    assert run(node, "install", "--check") == 1


def test_what_cannot_be_done_is_told(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(node, "install") == 1
    assert "no CNI configuration found yet" in capsys.readouterr().out


def test_p04_uninstall_is_refused_while_an_agent_runs(node: Node) -> None:
    import os

    node.write("10-calico.conflist", text(CALICO))
    run(node, "install")
    directory = Path(node.root / "run")
    directory.mkdir()
    lock = claim(directory)
    before = node.snapshot()
    try:
        with pytest.raises(SluiceError, match="an agent runs"):
            run(node, "uninstall")
    finally:
        os.close(lock)
    assert node.snapshot() == before
