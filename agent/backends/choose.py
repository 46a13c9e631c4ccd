"""Which mechanisms are used on this node, and which are to be cleaned away. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agent.backends.base import Backend, Support
from agent.core.errors import SettingsError

PREFERENCE = ("nftables", "iptables")
# What each choice consists of, in the order of application; removal goes backwards.
LAYERS: Mapping[str, tuple[str, ...]] = {
    "nftables": ("routing", "nftables"),
    "iptables": ("routing", "iptables"),
}

WORKERS: Mapping[str, int] = {"nftables": 1, "iptables": 4}


@dataclass(frozen=True, slots=True)
class Choice:
    """`active` layers in order of application; `retired` ones get want=None once per pod.

    `workers`: how many pods are worked on at a time. Netlink alone is faster from one thread (the others
    would only fight for the interpreter and for the kernel's locks), processes are worth waiting for in several.
    """

    name: str
    reason: str
    active: tuple[Backend, ...]
    retired: tuple[Backend, ...]
    workers: int = 1


def choose(setting: str, backends: Mapping[str, Backend], support: Mapping[str, Support]) -> Choice:
    """Both mappings by name. Raises SettingsError, naming what is missing, when none can be used."""
    candidates = PREFERENCE if setting == "auto" else (setting,)
    problems = []
    for name in candidates:
        failed = [f"{layer}: {support[layer].missing}" for layer in LAYERS[name] if not support[layer].ok]
        if failed:
            problems += failed
            continue
        skipped = f"; not usable here: {'; '.join(problems)}" if problems else ""
        reason = f"setting backend={setting}" + (f", first that works{skipped}" if setting == "auto" else "")
        active = tuple(backends[layer] for layer in LAYERS[name])
        retired = tuple(b for b in backends.values() if b not in active)
        return Choice(name, reason, active, retired, WORKERS[name])
    raise SettingsError(f"no backend can be used (setting backend={setting}): {'; '.join(problems)}")
