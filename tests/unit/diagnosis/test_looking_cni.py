# SPDX-License-Identifier: Apache-2.0
"""The runtime's directories as real files: what the installer would do, the binary, and the runtime's watches."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from support.installing import CALICO, NOBODY, text

from agent.core.errors import SettingsError
from agent.core.settings import Settings
from agent.diagnosis.checks import CHECKS
from agent.diagnosis.finding import CheckResult, CheckVerdict, examine
from agent.diagnosis.node_facts import Cni, NodeFacts
from agent.diagnosis.probes import cni as looks
from agent.install.installer import Installer
from agent.install.runtime import Running
from agent.kernel.inotify import Inotify

PLUGIN = """#!/bin/sh
[ "$CNI_COMMAND" = VERSION ] && echo '{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}'
"""


class Place:
    """Directories of a runtime, installed as the agent does it."""

    def __init__(self, at: Path) -> None:
        self.conf, self.bin, source = at / "net.d", at / "bin", at / "source"
        self.conf.mkdir()
        self.bin.mkdir()
        source.write_text(PLUGIN)
        source.chmod(0o755)
        self.settings = Settings(
            cni_install="own", cni_conf_dir=str(self.conf), cni_bin_dir=str(self.bin), cni_plugin=str(source)
        )
        (self.conf / "10-calico.conflist").write_bytes(text(CALICO))

    def install(self) -> None:
        Installer(self.settings, NOBODY).step()

    def look(self) -> Cni:
        return looks.probe(self.settings, NOBODY)

    def check(self, name: str) -> tuple[CheckResult, ...]:
        return examine(next(one for one in CHECKS if one.id == name), NodeFacts(self.settings, cni=self.look()))

    def verdict(self, name: str) -> tuple[CheckVerdict, str]:
        worst = max(self.check(name), key=lambda one: list(CheckVerdict).index(one.verdict))
        return worst.verdict, worst.found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    made.install()
    return made


def test_as_installed_all_is_right(place: Place) -> None:
    for name in ("cni-configuration", "cni-primary", "cni-directories", "cni-plugin", "istio-cni"):
        assert place.verdict(name)[0] is CheckVerdict.OK, place.check(name)
    assert "calico > portmap > sluice-cni" in place.verdict("cni-configuration")[1]


def test_p01_p08_a_list_that_comes_before_ours_is_told_with_whose_it_is(place: Place) -> None:
    (place.conf / "00-kindnet.conflist").write_text(
        json.dumps({"name": "k", "cniVersion": "1.0.0", "plugins": [{"type": "ptp"}]})
    )
    verdict, found = place.verdict("cni-configuration")
    assert verdict is CheckVerdict.WRONG and "00-kindnet.conflist (ptp)" in found
    assert place.verdict("cni-primary") == (
        CheckVerdict.WARNING,
        f"{place.conf}: 00-kindnet.conflist (ptp), 10-calico.conflist (calico)",
    )
    (place.conf / "00-kindnet.conflist").unlink()
    assert place.verdict("cni-configuration")[0] is CheckVerdict.OK


def test_p07_our_list_removed_or_out_of_date(place: Place) -> None:
    ours = place.conf / "02-sluice.conflist"
    kept = ours.read_bytes()
    ours.unlink()
    verdict, found = place.verdict("cni-configuration")
    assert verdict is CheckVerdict.WRONG and "10-calico.conflist (calico > portmap)" in found
    ours.write_bytes(kept)
    (place.conf / "10-calico.conflist").write_bytes(text(CALICO, "bandwidth"))
    verdict, found = place.verdict("cni-configuration")
    assert verdict is CheckVerdict.WRONG and "write 02-sluice.conflist" in found
    place.install()
    assert place.verdict("cni-configuration")[0] is CheckVerdict.OK


def test_p07_cilium_renames_it(place: Place) -> None:
    (place.conf / "02-sluice.conflist").rename(place.conf / "02-sluice.conflist.cilium_bak")
    assert place.verdict("cni-primary") == (CheckVerdict.WRONG, f"{place.conf}/02-sluice.conflist.cilium_bak")


def test_p25_a_damaged_list_is_named(place: Place) -> None:
    (place.conf / "01-half.conflist").write_text('{"name": "half", "plug')
    assert "01-half.conflist: not JSON" in place.verdict("cni-configuration")[1]


def test_p19_p21_the_binary(place: Place) -> None:
    binary = place.bin / "sluice-cni"
    kept = binary.read_bytes()
    binary.write_bytes(kept + b"# older\n")
    assert "differs from" in place.verdict("cni-plugin")[1]
    binary.write_bytes(kept)
    binary.chmod(0o644)
    assert any("Permission denied" in one.found for one in place.check("cni-plugin"))
    binary.write_text("#!/bin/sh\necho not JSON\n")
    binary.chmod(0o755)
    assert any("sluice-cni: " in one.found and one.verdict is CheckVerdict.WRONG for one in place.check("cni-plugin"))
    binary.unlink()
    assert place.verdict("cni-plugin") == (CheckVerdict.WRONG, f"{binary} is not there")


def test_without_an_installation_of_ours_nothing_is_asked_for(tmp_path: Path) -> None:
    bare = Place(tmp_path)
    bare.settings = Settings(
        cni_conf_dir=str(bare.conf), cni_bin_dir=str(bare.bin), cni_plugin=bare.settings.cni_plugin
    )
    assert bare.look().managed == "off"
    assert [bare.verdict(name)[0] for name in ("cni-configuration", "cni-plugin")] == [CheckVerdict.OK] * 2


def test_istio_cni_beside_us_is_told(place: Place) -> None:
    (place.conf / "10-calico.conflist").write_bytes(text(CALICO, "istio-cni"))
    assert place.verdict("istio-cni")[0] is CheckVerdict.WARNING


def test_what_cannot_be_read_is_raised(place: Place) -> None:
    shutil.rmtree(place.conf)
    place.conf.write_text("a file")
    assert place.verdict("cni-configuration")[0] is CheckVerdict.WRONG
    place.conf.unlink()
    place.conf.symlink_to(place.conf.name)
    with pytest.raises((SettingsError, OSError)):
        place.look()


def test_p26_a_runtime_that_watches_a_directory_that_is_gone(tmp_path: Path) -> None:
    """The test plays containerd: fsnotify's queue is an inotify queue like ours."""
    directory, runtime, proc = tmp_path / "net.d", Running(os.getpid(), "containerd"), Path("/proc")
    directory.mkdir()
    queue = Inotify()
    try:
        queue.add(directory)
        assert looks._watched(runtime, directory, proc) is True
        # Kept under another name, as a mount or an open directory would: a new one may not get the same inode.
        directory.rename(tmp_path / "older")
        directory.mkdir()
        assert looks._watched(runtime, directory, proc) is False
    finally:
        queue.close()


def test_p26_a_runtime_that_cannot_be_seen_is_not_judged(tmp_path: Path) -> None:
    assert looks._watched(Running(2**22 + 1, "containerd"), tmp_path, Path("/proc")) is None
