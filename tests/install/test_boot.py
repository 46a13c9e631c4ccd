# SPDX-License-Identifier: Apache-2.0
"""Reboots in every order, and every end that an agent can come to: what is installed stays, and stays first."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.installing import CALICO, Node, Reader, running, text, types, until

NAME = "10-kindnet.conflist"
BOOTS = 100


def primary_boots(node: Node, how: random.Random) -> None:
    """Any of what primary plugins do to their own file when they start; plugins vary with their version."""
    data = text(CALICO, *how.choice([(), ("bandwidth",), ("tuning", "bandwidth")]))
    path = node.conf / NAME
    match how.randrange(4):
        case 0:
            path.unlink(missing_ok=True)
            path.write_bytes(data)
        case 1:
            (node.conf / "tmp").write_bytes(data)
            (node.conf / "tmp").rename(path)
        case 2:
            with path.open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                file.write(data[len(data) // 2 :])
        case 3:
            path.unlink(missing_ok=True)  # gone until the next boot


@pytest.mark.parametrize("mode", ["own"])
def test_p01_boot_orders(node: Node, mode: str) -> None:
    """A hundred reboots: {primary, pods, agent} in every order.

    From the first installation on there is no moment at which a runtime's first list lacks Sluice's entry. Pods start
    at all moments: the reader never stops.
    """
    node.write(NAME, text(CALICO))
    node.installer(cni_install=mode).step()
    how = random.Random(1)
    orders = itertools.cycle(itertools.permutations(["primary", "pods", "agent"]))

    async def boot(order: tuple[str, ...]) -> None:
        made = node.installer(cni_install=mode)
        async with running(made):
            for event in order:
                match event:
                    case "primary":
                        primary_boots(node, how)
                    case "pods":
                        assert types(node.first())[-1] == "sluice-cni"
                    case "agent":
                        await until(lambda: made.ready, "ready")
        # The node goes down without a word: the task is cancelled wherever it is.

    with Reader(node.conf) as reader:
        for _ in range(BOOTS):
            asyncio.run(boot(next(orders)))
    assert reader.uncaptured == []
    assert reader.torn == []
    assert reader.looks > BOOTS


def test_p01_the_agent_comes_last_and_brings_in_what_the_primary_has_become(node: Node) -> None:
    node.write(NAME, text(CALICO))
    node.installer().step()
    node.write(NAME, text(CALICO, "bandwidth"))
    assert types(node.first()) == ["calico", "portmap", "sluice-cni"]  # as before the reboot: captured or refused
    node.installer().step()
    assert types(node.first()) == ["calico", "portmap", "bandwidth", "sluice-cni"]


def test_p01_the_primary_is_not_back_yet(node: Node) -> None:
    """Our list stands alone after a reboot: it is kept, also by a newer agent with another entry."""
    primary = node.write(NAME, text(CALICO))
    node.installer().step()
    primary.unlink()
    made = node.installer(exclude_namespaces="kube-system,other")
    made.step()
    assert made.ready
    assert types(node.first()) == ["calico", "portmap", "sluice-cni"]
    assert node.first()["plugins"][-1]["excludeNamespaces"] == ["kube-system", "other"]
    assert any("is missing" in words for words in made.verdict.remarks)


_AGENT = """
import asyncio, json, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where these tests run in the background
from agent.core.settings import Settings
from agent.install.installer import Installer
made = Installer(Settings(**json.loads(sys.argv[1])), Path("/nonexistent/proc"))
async def main():
    task = asyncio.create_task(made.run())
    while not made.ready:
        await asyncio.sleep(0.01)
    print("ready", flush=True)
    await task
asyncio.run(main())
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGABRT])
@pytest.mark.parametrize("mode", ["own", "insert"])
def test_p04_every_end_leaves_the_files_as_they_are(node: Node, mode: str, end: signal.Signals) -> None:
    """Byte by byte, the same inodes, untouched; out of memory is SIGKILL."""
    node.write(NAME, text(CALICO))
    settings = {
        "cni_install": mode,
        "host_root": str(node.root),
        "cni_plugin": str(node.source),
        "run_dir": str(node.root / "run"),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", _AGENT, json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).resolve().parents[2],
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        before = node.snapshot()
        process.send_signal(end)
        assert process.wait(timeout=20) != 0
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
    assert node.snapshot() == before
    assert "sluice-cni" in types(node.first())


def test_p04_a_restart_changes_nothing(node: Node) -> None:
    node.write(NAME, text(CALICO))
    node.installer().step()
    before = node.snapshot()
    for _ in range(3):
        made = node.installer()
        made.step()
        assert made.ready
    assert node.snapshot() == before
    assert made.rewrites == 0


def test_what_a_crash_left_of_writing_goes(node: Node) -> None:
    node.write(NAME, text(CALICO))
    (node.conf / ".sluice-new-4711").write_bytes(b"{")
    (node.bin / ".sluice-cni-abc").write_bytes(b"\x7fEL")
    node.installer().step()
    assert sorted(path.name for path in node.conf.iterdir()) == ["02-sluice.conflist", NAME]
    assert [path.name for path in node.bin.iterdir()] == ["sluice-cni"]


def test_p25_a_reader_never_sees_half_a_file() -> None:
    """Ten thousand rewrites under a reader that never stops. In memory, if there is some: disks are slow to sync."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="slu-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as at:
        node = Node(Path(at) / "host")
        node.write(NAME, text(CALICO))
        made = node.installer()
        made.step()
        from agent.install.host_root import HostRoot
        from agent.install.netdir import NetDir
        from agent.install.planning import Write

        directory = NetDir(HostRoot(str(node.root)), "/etc/cni/net.d")
        versions = [(node.conf / "02-sluice.conflist").read_bytes()]
        versions.append(versions[0].replace(b'"portmap"', b'"' + b"x" * 5000 + b'"'))
        with Reader(node.conf) as reader:
            for number in range(10_000):
                directory.apply(Write("02-sluice.conflist", versions[number % 2]))
        assert (reader.torn, reader.uncaptured) == ([], [])
        assert reader.looks > 100


def test_the_plugin_can_be_run_while_it_is_replaced(node: Node) -> None:
    """Never "text file busy", never half of it, never not there."""
    node.write(NAME, text(CALICO))
    scripts = [b"#!/bin/sh\necho {}\n", b"#!/bin/sh\n" + b"# newer\n" * 2000 + b"echo {}\n"]
    node.source.write_bytes(scripts[0])
    node.installer().step()
    stop, failures, runs = threading.Event(), list[object](), []

    def run() -> None:
        while not stop.is_set():
            done = subprocess.run([node.bin / "sluice-cni"], capture_output=True, check=False)
            runs.append(1)
            if (done.returncode, done.stdout) != (0, b"{}\n"):
                failures.append(done)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for number in range(100):
            node.source.write_bytes(scripts[number % 2])
            node.installer().step()
            assert (node.bin / "sluice-cni").read_bytes() == scripts[number % 2]
    finally:
        stop.set()
        thread.join()
    assert failures == []
    assert runs
    assert (node.bin / "sluice-cni").stat().st_mode & 0o7777 == 0o755
