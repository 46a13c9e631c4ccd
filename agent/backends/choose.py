# SPDX-License-Identifier: Apache-2.0
"""Chooses the mechanisms that this node uses, and those to clean up. Pure.

Looking must not decide what is seen later: candidates are tried one after the other and only until one passes, so
that a module of legacy iptables is never loaded by a check for its presence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from agent.backends.base import PodLayer, Support
from agent.core.errors import SettingsError
from agent.core.model.host import HostView, InKernel, Variant

# What each choice consists of, in the order of application; removal goes backwards.
LAYERS: Mapping[str, tuple[str, ...]] = {
    "nftables": ("routing", "conntrack", "nftables"),
    "iptables": ("routing", "conntrack", "iptables"),
    "iptables-legacy": ("routing", "conntrack", "iptables-legacy"),
    "ebpf": ("routing", "ebpf-programs", "ebpf"),
}

_KEPT = "kept from the last start"
_FORMER = ("iptables", "iptables-legacy")  # mechanisms of the probe exemption of earlier versions
WORKERS: Mapping[str, int] = {"nftables": 1, "iptables": 4, "iptables-legacy": 4, "ebpf": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """`active` layers in order of application; `retired` ones get want=None once per pod.

    `workers`: how many pods are worked on at a time. Netlink alone is faster from one thread (the others
    would only fight for the interpreter and for the kernel's locks), processes are worth waiting for in several.
    `by_socket`: connections are captured when their sockets ask, and need nothing afterwards; else they are translated
    for as long as they live. Where sockets are asked, those of ztunnel have to be known.
    """

    name: str
    reason: str
    active: tuple[PodLayer, ...]
    retired: tuple[PodLayer, ...]
    workers: int = 1
    by_socket: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The choice of an earlier start, under the kernel `release`; `time` in seconds since 1970."""

    backend: str
    reason: str
    host: str
    host_reason: str
    release: str
    time: float


@dataclass(frozen=True, slots=True)
class Trials:
    """Trials of a candidate. Each is called only when needed, since a trial may load modules.

    `probe` takes a layer's name. `test` takes the layers of a choice and returns what did not work, () when all did.
    `explain` takes a choice's name and returns what is missing for it, with what to do, one line each.
    """

    probe: Callable[[str], Support]
    test: Callable[[Sequence[PodLayer]], Sequence[str]] = lambda layers: ()
    explain: Callable[[str], Sequence[str]] = lambda name: ()


def choose(
    setting: str,
    backends: Mapping[str, PodLayer],
    trials: Trials,
    view: HostView | None = None,
    recorded: Recorded | None = None,
) -> Choice:
    """Returns the first candidate that passes preflight and functional test; the setting leaves one, or several.

    Raises SettingsError, naming for every candidate what is missing and what to do, when none passes: nothing was
    touched then, and rules that work stay as they are.
    """
    tried: dict[str, Support] = {}
    problems: dict[str, str] = {}
    for name, reason in candidates(setting, view, recorded).items():
        problem = _problem(name, backends, trials, tried)
        if not problem:
            reasons = [reason, *(f"{other} cannot be used: {why}" for other, why in problems.items())]
            active = tuple(backends[layer] for layer in LAYERS[name])
            retired = tuple(b for b in reversed(list(backends.values())) if b not in active)
            return Choice(
                name=name,
                reason="; ".join(reasons),
                active=active,
                retired=retired,
                workers=WORKERS[name],
                by_socket=name == "ebpf",
            )
        problems[name] = problem
    details = " | ".join(f"{name}: {'; '.join(trials.explain(name)) or why}" for name, why in problems.items())
    raise SettingsError(f"no backend can be used (setting backend={setting}), nothing was changed: {details}")


def candidates(setting: str, view: HostView | None, recorded: Recorded | None) -> dict[str, str]:
    """Returns choice -> reason, in the order of trials. A record of another kernel is of another boot and ignored.

    eBPF is only taken where it is asked for, or was; and what asks for it is content with what comes after it.
    """
    if setting not in ("auto", "ebpf"):
        return {setting: f"setting backend={setting}"}
    order: dict[str, str] = {"ebpf": "setting backend=ebpf"} if setting == "ebpf" else {}
    if (
        setting == "auto"
        and recorded
        and recorded.backend in LAYERS
        and (view is None or view.release == recorded.release)
    ):
        again = recorded.reason.startswith(_KEPT)
        order[recorded.backend] = recorded.reason if again else f"{_KEPT}: {recorded.reason}"
    order.setdefault("nftables", f"setting backend={setting}, the first that works")
    name, why = _variant(view)
    other = "iptables" if name == "iptables-legacy" else "iptables-legacy"
    order.setdefault(name, f"setting backend={setting}, {why}")
    order.setdefault(other, f"setting backend={setting}, the last that was left")
    return order


def choose_host(setting: str, view: HostView) -> tuple[str, str]:
    """Returns (mechanism, reason) of the probe exemption in the host's own namespace; "off" when the setting says so.

    The kernel's NAT hook asks its chains for each new connection in the order of their priorities until one has
    answered (nf_nat_inet_fn). Every iptables registers with 100; a chain of nf_tables has a priority of its own choice
    and so comes before both variants. eBPF cannot exempt processes on the host.
    """
    if setting == "off":
        return "off", "setting host_probes=off"
    reason = f"setting host_probes={setting}" if setting == "nftables" else "its chain comes before those of iptables"
    if setting in _FORMER:
        reason = f"setting host_probes={setting} of earlier versions means nftables now"
    if view.nf_tables is InKernel.ABSENT:
        reason += f"; nf_tables is {view.nf_tables.value}: load it, or set host_probes: off"
    return "nftables", reason


def _problem(name: str, backends: Mapping[str, PodLayer], trials: Trials, tried: dict[str, Support]) -> str:
    for layer in LAYERS[name]:
        if layer not in backends:
            return f"there is no {layer} in this build"
        if layer not in tried:
            tried[layer] = trials.probe(layer)
        if not tried[layer].ok:
            return f"{layer}: {tried[layer].missing}"
    return "; ".join(trials.test([backends[layer] for layer in LAYERS[name]]))


def _variant(view: HostView | None) -> tuple[str, str]:
    """Returns the iptables variant of the host: by its rules, else by its program; the newer one in doubt."""
    if view is None:
        return "iptables", "the variant that most hosts use"
    modern, legacy = view.xtables_rules(Variant.NFT), view.xtables_rules(Variant.LEGACY)
    if legacy and not modern:
        return "iptables-legacy", f"as the host, which has {legacy} rules of legacy iptables"
    if modern:
        both = f" besides {legacy} legacy ones" if legacy else ""
        return "iptables", f"as the host, which has {modern} rules of iptables-nft{both}"
    if view.iptables is Variant.LEGACY:
        return "iptables-legacy", "as the host: its iptables is the legacy variant"
    if view.iptables is Variant.NFT:
        return "iptables", "as the host: its iptables writes nf_tables"
    return "iptables", "the host shows no variant"
