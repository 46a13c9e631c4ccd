# SPDX-License-Identifier: Apache-2.0
"""The Vagrantfile is valid in both flavours for both providers, and hands the scripts what they ask for.

Vagrant is Debian's with libvirt's provider, fetched and unpacked by `vagrant/vm/vagrant --fetch`; where it cannot be,
the tests are skipped, in CI they fail. VirtualBox is in no Debian release: a program of its name says that it is there.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
VAGRANT = REPO / "vagrant" / "vm" / "vagrant"
FLAVOURS, PROVIDERS = ("standalone", "k3s"), ("libvirt", "virtualbox")
ONES = [VAGRANT, *(REPO / "vagrant" / name for name in ("vm/image", "vm/box", "try", "archives"))]
SCRIPTS = sorted([*REPO.glob("vagrant/provision/*.sh"), *REPO.glob("vagrant/vm/files/*.sh"), *ONES])


def vagrant(tmp_path: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs in a home of its own; asks nobody whether there is a newer one."""
    box = tmp_path / "bin" / "VBoxManage"
    box.parent.mkdir(exist_ok=True)
    box.write_text("#!/bin/sh\necho 7.0.6r155176\n")
    box.chmod(0o755)
    whole = {
        **os.environ, "PATH": f"{box.parent}:{os.environ['PATH']}", "VAGRANT_HOME": str(tmp_path / "home"),
        "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot"), "VAGRANT_CHECKPOINT_DISABLE": "1", **environment,
    }  # fmt: skip
    where = REPO / "vagrant"
    return subprocess.run([VAGRANT, *argv], cwd=where, env=whole, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module", autouse=True)
def program(tmp_path_factory: pytest.TempPathFactory) -> None:
    said = subprocess.run([VAGRANT, "--fetch"], capture_output=True, text=True, timeout=280)
    if not said.returncode:
        said = vagrant(tmp_path_factory.mktemp("vagrant"), "--version")
    if said.returncode:
        why = f"no Vagrant: {said.stderr.strip()}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)


@pytest.mark.timeout(400)  # the first one fetches it
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_each_flavour_is_valid_for_each_provider(tmp_path: Path, flavour: str, provider: str) -> None:
    done = vagrant(tmp_path, "validate", SLUICE_FLAVOUR=flavour, VAGRANT_DEFAULT_PROVIDER=provider)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validated successfully" in done.stdout


@pytest.mark.timeout(120)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_mistake_in_a_providers_block_would_be_told(tmp_path: Path, provider: str) -> None:
    """Else the test above could pass without that provider's plugin having looked."""
    text = (REPO / "vagrant/Vagrantfile").read_text()
    wrong = text.replace(f"{provider}.memory = memory", f"{provider}.memory_of_it = memory")
    assert wrong != text
    file = REPO / "vagrant" / f".Vagrantfile.{os.getpid()}.{provider}"
    try:
        file.write_text(wrong)
        done = vagrant(tmp_path, "validate", VAGRANT_VAGRANTFILE=file.name, VAGRANT_DEFAULT_PROVIDER=provider)
    finally:
        file.unlink()
    assert done.returncode != 0
    assert "memory_of_it" in done.stdout + done.stderr


@pytest.mark.timeout(120)
def test_an_unknown_flavour_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    done = vagrant(tmp_path, "validate", SLUICE_FLAVOUR="kubeadm")
    assert done.returncode != 0
    assert "SLUICE_FLAVOUR=kubeadm: there are standalone and k3s" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_each_script_is_executable_and_parses(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert os.access(script, os.X_OK)
