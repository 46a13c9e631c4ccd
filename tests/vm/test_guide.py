# SPDX-License-Identifier: Apache-2.0
"""The lab's standalone flavour in virtual machines: the scripts that Vagrant runs, then the guided script over ssh."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import vm
from support.vm import NODES, Machines, machines

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(7200)]
TRANSCRIPT = vm.REPO / "build" / "transcripts" / "guide-vm.txt"
PATIENCE = 600  # seconds that one step of the guide may take on an emulated core


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Archives of this version and the one before, from $SLUICE_ARCHIVES if they have been made already."""
    if ready := os.environ.get("SLUICE_ARCHIVES"):
        made = Path(ready)
    else:
        made = tmp_path_factory.mktemp("archives")
        subprocess.run([vm.REPO / "vagrant/archives", made], check=True, timeout=600)
    older = next(made.glob("sluice-*~*.tar.gz"))
    return next(path for path in made.glob("*.tar.gz") if path != older), older


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Machines with all that comes before Sluice: runtime, routes, primary CNI."""
    if command := vm.lacking():
        pytest.fail(f"programs are missing; {command}")
    subprocess.run([vm.REPO / "vagrant/vm/image", vm.IMAGE], check=True, timeout=3600)
    with machines(f"slu-vm{os.getpid()}", tmp_path_factory.mktemp("vm")) as made:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: provision(made, name), NODES))
        yield made


def provision(lab: Machines, name: str) -> None:
    """As the Vagrantfile does; twice over, for a script must be safe to repeat."""
    lab.copy(name, [vm.REPO / "vagrant/provision"], "/tmp/sluice")
    routes = " ".join(f"{subnet(other)}={vm.NETWORK}.{last}" for other, last in NODES.items() if other != name)
    for _ in range(2):
        for step in ("packages.sh", "containerd.sh", f"network.sh {routes}", f"cni.sh {subnet(name)}"):
            lab.sh(name, f"/tmp/sluice/provision/{step}", seconds=vm.SECONDS)
    lab.say(f"{name} is provisioned")


def subnet(name: str) -> str:
    return f"10.244.{NODES[name] - 10}.0/24"


def test_the_machines_are_debians_with_its_kernel_and_what_the_scripts_promise(lab: Machines) -> None:
    for name in NODES:
        said = lab.sh(name, "hostname; uname -r; cat /proc/sys/net/ipv4/ip_forward; systemctl is-system-running || :")
        assert said.split()[0] == name
        assert said.split()[1].startswith("6.1."), said
        assert said.split()[2] == "1"
        routes = lab.sh(name, "ip -4 route").splitlines()
        others = [other for other in NODES if other != name]
        assert all(any(line.startswith(f"{subnet(other)} via") for line in routes) for other in others), routes
        # Nothing was fetched while the machine ran: what packages.sh names is in the image.
        assert lab.sh(name, "/tmp/sluice/provision/packages.sh").strip() == "packages: all there"


def test_every_claim_of_the_guide_holds(lab: Machines, archives: tuple[Path, Path]) -> None:
    TRANSCRIPT.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ, "GUIDE_ON": str(lab.base / "on"), "GUIDE_ARCHIVE": str(archives[0]),
        "GUIDE_PREVIOUS": str(archives[1]), "GUIDE_PATIENCE": str(PATIENCE), "GUIDE_FLAVOUR": "standalone",
    }  # fmt: skip
    ours = shutil.copytree(vm.REPO / "vagrant", lab.base / "vagrant")  # a shell reads its script while it runs
    argv = [str(ours / "guide/guide.sh")]
    with TRANSCRIPT.open("w") as out:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        limit = threading.Timer(6000, process.kill)
        limit.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                out.write(line)
                out.flush()
                if line.startswith(("== ", "  ok ", "  FAIL ")):
                    lab.say(line.strip())
            code = process.wait()
        finally:
            limit.cancel()
            process.kill()
            process.wait()
    said = TRANSCRIPT.read_text()
    assert "  FAIL " not in said, [line for line in said.splitlines() if line.startswith("  FAIL ")]
    assert code == 0, said[-2000:]
    assert said.count("  ok ") > 30  # a guide that claims nothing would have passed, too
