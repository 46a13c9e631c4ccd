# SPDX-License-Identifier: Apache-2.0
"""Checks of the CNI installation: Sluice's list first, the plugin installed, other writers. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from agent.diagnosis.finding import CheckLine, check, ok, unknown, warning, wrong
from agent.diagnosis.node_facts import NodeFacts

_USUAL = "the default: no"  # prefix of the reason if no runtime's configuration was found (install.runtime)
# Type of a primary plugin -> its product, and how it behaves next to other lists.
_PRIMARY = {
    "ptp": ("kindnet or the reference plugins", "kindnet writes its list again at each start"),
    "cilium-cni": ("Cilium", "with cni.exclusive it renames the lists of others; set cni.exclusive=false"),
    "aws-cni": ("aws-node", "it writes its list again at each start"),
    "calico": ("Calico", "it writes its list again when its token changes"),
    "multus": ("Multus", "it wraps the first list that it finds, which may be Sluice's"),
    "multus-shim": ("Multus", "it wraps the first list that it finds, which may be Sluice's"),
    "flannel": ("flannel", ""),
    "azure-vnet": ("Azure", "it writes its list again at each start"),
    "antrea": ("Antrea", ""),
    "ovn-k8s-cni-overlay": ("OVN-Kubernetes", "in shared gateway mode set routingViaHost for probes"),
    "bridge": ("the reference plugins", ""),
}
_RENAMED = (".cilium_bak", ".cilium_backup")


@check(
    "cni-configuration",
    "Sluice's list is the first that the runtime uses",
    problems="P01 P04 P07 P08 P19 P25 P27",
    needs="cni",
)
def _configuration(facts: NodeFacts) -> Iterator[CheckLine]:
    cni = facts.cni
    own = [one.name for one in cni.files if one.ours]
    # istio-cni's own list stays before Sluice's (install.planning); the verdict's remarks report it.
    followed = [one for one in cni.files if own and not one.ours and "istio-cni" in one.types]
    first = next((one for one in cni.files if one.types and one not in followed), None)
    if cni.managed == "off" and not own:
        yield ok("cni_install is off and no list has sluice-cni: pods are announced by other means")
        return
    if cni.error or cni.verdict.error:
        error = cni.error or cni.verdict.error
        yield wrong(f"{cni.directory}: {error}", "Sluice's list cannot be written", "remove the cause; sluice install")
        return
    if first is None:
        cause = "the primary CNI has not written its list, or pods get their network by other means"
        yield wrong(f"{cni.directory}: no CNI configuration that a runtime would use", cause, f"ls -la {cni.directory}")
        return
    if not first.ours:
        first_list = f"{first.name} ({' > '.join(first.types)})"
        writer = next((_PRIMARY[one][0] for one in first.types if one in _PRIMARY), "another program")
        why = f"{writer} wrote it" if own else f"no list has Sluice's entry; {writer} wrote the first one"
        remedy = "sluice install --check; sluice install, or start the agent, which maintains it"
        yield wrong(f"{cni.directory}: the runtime uses {first_list}, which does not have sluice-cni", why, remedy)
        return
    steps = "; ".join(map(str, cni.verdict.actions))
    if steps:
        cause = "the primary list or the settings have changed since Sluice's list was derived from it"
        yield wrong(f"{cni.directory}: to do: {steps}", cause, "sluice install, or start the agent, which maintains it")
        return
    yield from (
        warning(f"{cni.directory}: {error}", "a remark on Sluice's list", "sluice install --check")
        for error in cni.verdict.remarks
    )
    if not cni.verdict.remarks:
        yield ok(f"{cni.directory}/{first.name}: {' > '.join(first.types)}")


@check(
    "cni-primary",
    "one primary network, and no program renames lists",
    problems="P01 P07 P24",
    needs="cni",
    fine="no second primary list, and no list was renamed",
)
def _primaries(facts: NodeFacts) -> Iterator[CheckLine]:
    cni = facts.cni
    for name in cni.view.files:
        if name.endswith(_RENAMED):
            yield wrong(
                f"{cni.directory}/{name}",
                "Cilium renames lists that are not its own (cni.exclusive=true)",
                "helm upgrade cilium --set cni.exclusive=false; then sluice install",
            )
    others = [one for one in cni.files if one.types and not one.ours]
    kinds = {one.types[0]: one.name for one in others}
    if len(kinds) > 1:
        listed = ", ".join(f"{name} ({kind})" for kind, name in kinds.items())
        yield warning(
            f"{cni.directory}: {listed}",
            "several primary lists: the runtime uses the first by name; an older network may have left one",
            "remove the one that is not in use",
        )
    rewrites = [
        f"{_PRIMARY[kind][0]}: {_PRIMARY[kind][1]}"
        for one in others
        for kind in one.types
        if kind in _PRIMARY and _PRIMARY[kind][1]
    ]
    if facts.agent.status.get("cni") and not rewrites and len(kinds) < 2:
        return
    if len(kinds) == 1 and rewrites:
        yield ok(f"one primary list; {rewrites[0]}; the agent restores Sluice's")


@check("cni-directories", "where the runtime reads lists and plugins", problems="P20", needs="cni")
def _directories(facts: NodeFacts) -> Iterator[CheckLine]:
    cni = facts.cni
    observation = (
        f"configurations in {cni.directory} ({cni.directory_reason}), plugins in {cni.plugins} ({cni.plugins_reason})"
    )
    if cni.managed != "off" and cni.directory_reason.startswith(_USUAL):
        yield warning(
            observation,
            "no container runtime was found to report where it reads them",
            "set cni_conf_dir and cni_bin_dir, or, as root, in the node's PID namespace: sluice doctor",
        )
    else:
        yield ok(observation)


@check("cni-plugin", "the plugin is installed and can run", problems="P19 P21 P60j", needs="cni")
def _plugin(facts: NodeFacts) -> Iterator[CheckLine]:
    cni = facts.cni
    if cni.managed == "off" and not any(one.ours for one in cni.files):
        yield ok("no CNI list names sluice-cni")
        return
    if cni.plugin:
        yield wrong(
            cni.plugin,
            "the runtime executes it for each pod; without it no pod can start or end",
            "sluice install; if the file system is read-only, set cni_bin_dir",
        )
    if cni.runs:
        yield wrong(
            f"{cni.plugins}/sluice-cni: {cni.runs}",
            "it exists but cannot run: mounted noexec, denied by SELinux, or of another architecture",
            f"findmnt -T {cni.plugins}; sluice doctor security; sluice install",
        )
    if not cni.plugin and not cni.runs:
        yield ok(f"{cni.plugins}/sluice-cni is installed, is Sluice's and runs")


@check("cni-runtime", "the runtime sees changes of its directory", problems="P26", needs="cni")
def _runtime(facts: NodeFacts) -> Iterator[CheckLine]:
    cni = facts.cni
    if not cni.runtime:
        yield unknown("no container runtime is visible", "as root, in the node's PID namespace: sluice doctor")
    elif cni.watched is None:
        yield unknown(f"{cni.runtime}: its watches cannot be read", "crictl info | grep -A9 lastCNILoadStatus")
    elif cni.watched:
        yield ok(f"{cni.runtime} watches {cni.directory}")
    else:
        yield wrong(
            f"{cni.runtime} watches another directory than the present {cni.directory}",
            "the directory was removed and re-created: the runtime keeps using what it read before",
            f"systemctl restart {cni.runtime.split()[0]} (pods run on)",
        )


@check(
    "istio-cni", "no other mesh agent on this node", problems="P24 P30", needs="cni", fine="istio-cni is not installed"
)
def _istio(facts: NodeFacts) -> Iterator[CheckLine]:
    cni = facts.cni
    chained = [one.name for one in cni.files if "istio-cni" in one.types]
    if not cni.istio and not chained:
        return
    observation = "; ".join([*([cni.istio] if cni.istio else []), *(f"{name} chains istio-cni" for name in chained)])
    yield warning(
        observation,
        "istio-cni's agent runs on the same node: both program pods, and the last one wins",
        "sluice migrate --check",
    )
