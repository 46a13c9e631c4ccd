# SPDX-License-Identifier: Apache-2.0
"""The files that let the plugin pass pods while the agent is away."""

from __future__ import annotations

from pathlib import Path

from agent.core.model.pods import KubeNamespace, Pod, PodTable
from agent.core.settings import Settings
from agent.sources.state.offline_allowlist import OfflineAllowlist

MODE = "istio.io/dataplane-mode"


def files(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "exempt").iterdir())


def test_without_kubernetes_the_excluded_namespaces_and_our_own(tmp_path: Path) -> None:
    (tmp_path / "exempt").mkdir()
    (tmp_path / "exempt" / "old").touch()
    settings = Settings(run_dir=str(tmp_path), exclude_namespaces=("kube-system", "../evil"), own_namespace="sluice")
    OfflineAllowlist(settings, PodTable()).write()
    assert files(tmp_path) == ["kube-system", "sluice"]
    assert (tmp_path / "exempt" / "sluice").stat().st_mode & 0o777 == 0o600


def test_namespaces_that_are_known_not_to_be_enrolled_and_in_which_no_pod_enrols_itself(tmp_path: Path) -> None:
    table = PodTable()
    for name, labels in {"plain": {}, "mesh": {MODE: "ambient"}, "mixed": {}, "none": {MODE: "none"}}.items():
        table.know_namespace(KubeNamespace(name, labels))
    table.seen(Pod("u1", "mixed", "a", labels={MODE: "ambient"}))
    table.seen(Pod("u2", "plain", "b", labels={MODE: "none"}))
    exempt = OfflineAllowlist(Settings(run_dir=str(tmp_path)), table)
    exempt.write()
    assert files(tmp_path) == ["kube-system", "none", "plain"]
    table.know_namespace(KubeNamespace("plain", {MODE: "ambient"}))
    table.gone("u1")
    exempt.write()
    assert files(tmp_path) == ["kube-system", "mixed", "none"]


def test_the_setting_may_keep_all_but_the_excluded_ones_waiting(tmp_path: Path) -> None:
    table = PodTable()
    table.know_namespace(KubeNamespace("plain", {}))
    OfflineAllowlist(Settings(run_dir=str(tmp_path), offline_pods="refuse"), table).write()
    assert files(tmp_path) == ["kube-system"]
