# SPDX-License-Identifier: Apache-2.0
"""Which file is the primary one, and what is done when nothing is as it should be."""

from __future__ import annotations

import json

import pytest

from agent.core.settings import Settings
from agent.install import planning
from agent.install.conflists import plugin_entry
from agent.install.planning import InstallPlan, Remove, Rename, View, Write

WISHED = "02-sluice.conflist"
ENTRY = plugin_entry(Settings())
PLUGIN = {"type": "bridge"}


def network(name: str = "net", *kinds: str, **more: object) -> bytes:
    plugins = [{"type": kind} for kind in kinds or ("bridge",)]
    return json.dumps({"cniVersion": "1.0.0", "name": name, "plugins": plugins, **more}).encode()


def own(files: dict[str, bytes], **unread: str) -> InstallPlan:
    return planning.own(View(files, {key.replace("_", "."): why for key, why in unread.items()}), ENTRY, WISHED)


def installed(**files: bytes) -> dict[str, bytes]:
    """After `own`, with keys such as a_conflist."""
    made = {key.replace("_", "."): value for key, value in files.items()}
    for action in own(made).actions:
        assert isinstance(action, Write)
        made[action.name] = action.data
    return made


def kinds(data: bytes) -> list[str]:
    return [plugin["type"] for plugin in json.loads(data)["plugins"]]


def test_the_first_that_is_valid_is_the_primary() -> None:
    files = {"a.conflist": b"{", "b.txt": network("no"), "c.conf": b'{"type":"x","name":"c","cniVersion":"1.0.0"}'}
    verdict = own({**files, "d.conflist": network("d")})
    assert (verdict.primary, verdict.file) == ("c.conf", WISHED)
    assert any("01.conflist" in words for words in own({"01.conflist": b"{", "a.conflist": network()}).remarks)


def test_with_nothing_there_it_waits() -> None:
    verdict = own({})
    assert not verdict.right
    assert "no CNI configuration" in verdict.error
    assert not verdict.actions


@pytest.mark.parametrize("torn", [b"", b"{", network()[:-5], b'{"name": "x", "plugins": []}', b"\xef\xbb\xbf{}"])
def test_while_the_primary_is_half_written_the_last_good_state_stays(torn: bytes) -> None:
    files = installed(a_conflist=network("net", "bridge", "portmap"), b_conflist=network("other"))
    verdict = own({**files, "a.conflist": torn})
    assert verdict.actions == ()
    assert "a.conflist" in verdict.error
    assert verdict.file == WISHED


def test_while_the_primary_cannot_be_read_too() -> None:
    files = installed(a_conflist=network())
    files.pop("a.conflist")
    verdict = own(files, a_conflist="Input/output error")
    assert verdict.actions == ()
    assert "Input/output error" in verdict.error


def test_another_half_written_file_changes_nothing() -> None:
    files = installed(b_conflist=network())
    assert own({**files, "a.conflist": b"{"}).right


def test_the_primary_is_gone_and_another_valid_one_is_there() -> None:
    files = installed(a_conflist=network("net"), b_conflist=network("other"))
    del files["a.conflist"]
    (write,) = own(files).actions
    assert isinstance(write, Write)
    assert json.loads(write.data)["name"] == "other"


def test_a_primary_that_sorts_before_ours_moves_ours() -> None:
    files = installed(a_conflist=network())
    files["00-multus.conf"] = b'{"cniVersion":"0.3.1","name":"m","type":"multus","delegates":[]}'
    verdict = own(files)
    assert [str(action).split(" (")[0] for action in verdict.actions] == [
        "write 00-multus-sluice.conflist",
        f"remove {WISHED}",
    ]
    assert any("would not sort before" in words for words in verdict.remarks)


def test_a_setting_that_does_not_sort_first_does_not_win() -> None:
    verdict = planning.own(View({"10-a.conflist": network()}), ENTRY, "99-sluice.conflist")
    assert verdict.file == "10-a-sluice.conflist"
    assert any("99-sluice.conflist would not sort before" in words for words in verdict.remarks)


def test_the_settings_name_is_changed() -> None:
    files = installed(a_conflist=network())
    verdict = planning.own(View(files), ENTRY, "01-x.conflist")
    assert [type(action) for action in verdict.actions] == [Write, Remove]
    assert verdict.actions[1] == Remove(WISHED)


def test_ours_is_damaged() -> None:
    files = {**installed(a_conflist=network()), WISHED: b"{"}
    (write,) = own(files).actions
    assert write.name == WISHED
    assert Remove(WISHED) in planning.removal(View(files), WISHED).actions


def test_an_entry_of_ours_in_the_primary_is_not_chained_twice() -> None:
    """Multus takes whole lists in among its delegates; a second insertion point is ours alone to remove."""
    inner = {"cniVersion": "1.0.0", "name": "x", "plugins": [PLUGIN, {"type": "sluice-cni", "file": "other"}]}
    multus = {"cniVersion": "0.3.1", "name": "m", "type": "multus", "delegates": [inner]}
    files = {"00-multus.conf": json.dumps(multus).encode()}
    (write,) = own(files).actions
    assert isinstance(write, Write)
    made = json.loads(write.data)
    assert kinds(write.data) == ["multus", "sluice-cni"]
    assert made["plugins"][0]["delegates"][0]["plugins"] == [PLUGIN]
    (back,) = planning.removal(View(files), WISHED).actions
    assert isinstance(back, Write)
    assert json.loads(back.data) == {**multus, "delegates": [{**inner, "plugins": [PLUGIN]}]}


def test_istios_entry_is_kept_and_told_of() -> None:
    verdict = own({"a.conflist": network("net", "bridge", "istio-cni")})
    (write,) = verdict.actions
    assert isinstance(write, Write)
    assert kinds(write.data) == ["bridge", "istio-cni", "sluice-cni"]
    assert any("istio-cni" in words for words in verdict.remarks)


def test_inserting_takes_what_the_primary_has_rewritten_as_the_new_original() -> None:
    files = {"a.conflist": network()}
    for action in planning.insert(View(files), ENTRY, WISHED).actions:
        assert isinstance(action, Write)
        files[action.name] = action.data
    files["a.conflist"] = network("net", "bridge", "portmap")
    for action in planning.insert(View(files), ENTRY, WISHED).actions:
        assert isinstance(action, Write)
        files[action.name] = action.data
    assert kinds(files["a.conflist"]) == ["bridge", "portmap", "sluice-cni"]
    (rename,) = planning.removal(View(files), WISHED).actions
    assert isinstance(rename, Rename)
    assert files[rename.name] == network("net", "bridge", "portmap")


def test_what_another_has_changed_around_our_entry_stays_at_the_end() -> None:
    """Not what we wrote any more, so the kept bytes are not put back: our entry alone goes."""
    files = {"a.conflist": network()}
    for action in planning.insert(View(files), ENTRY, WISHED).actions:
        assert isinstance(action, Write)
        files[action.name] = action.data
    value = json.loads(files["a.conflist"])
    value["plugins"].insert(1, {"type": "linkerd-cni"})
    files["a.conflist"] = json.dumps(value).encode()
    write, remove = planning.removal(View(files), WISHED).actions
    assert isinstance(write, Write)
    assert kinds(write.data) == ["bridge", "linkerd-cni"]
    assert isinstance(remove, Remove)


def test_inserting_into_a_conf_beside_a_list_of_that_name() -> None:
    files = {"a.conf": b'{"type":"x","name":"c","cniVersion":"1.0.0"}', "a.conflist": network()}
    verdict = planning.insert(View(files), ENTRY, WISHED)
    assert not verdict.actions
    assert "exists already" in verdict.error


@pytest.mark.parametrize("version", ["0.2.0", "1.2.0"])
def test_a_version_that_cannot_be_chained_is_told_and_nothing_done(version: str) -> None:
    files = {"a.conflist": network(cniVersion=version)}
    for make in (planning.own, planning.insert):
        verdict = make(View(files), ENTRY, WISHED)
        assert version in verdict.error
        assert not verdict.actions
        assert not verdict.right


def test_a_forged_entry_leads_nowhere() -> None:
    """Names in an entry are somebody's text: nothing outside the directory is written or removed for them."""
    evil = {"type": "sluice-cni", "file": WISHED, "wraps": "../../etc/passwd.conf", "from": "../x.conf"}
    data = json.dumps({"cniVersion": "1.0.0", "name": "n", "plugins": [PLUGIN, evil]}).encode()
    inserted = {**evil, "file": "a.conflist"}
    del inserted["wraps"]
    other = json.dumps({"cniVersion": "1.0.0", "name": "n", "plugins": [PLUGIN, inserted]}).encode()
    for files in ({WISHED: data}, {"a.conflist": other}):
        for action in planning.removal(View(files), WISHED).actions:
            assert "/" not in action.name
            assert not isinstance(action, Rename) or "/" not in action.to


@pytest.mark.parametrize("wraps", [5, None, "", {}, "/", ".conf"])
def test_an_entry_with_strange_names_is_borne(wraps: object) -> None:
    evil = {"type": "sluice-cni", "file": WISHED, "wraps": wraps}
    files = {WISHED: json.dumps({"cniVersion": "1.0.0", "name": "n", "plugins": [PLUGIN, evil]}).encode()}
    own(files)
    own({**files, "a.conflist": network()})
    for action in planning.removal(View(files), WISHED).actions:
        assert "/" not in action.name
