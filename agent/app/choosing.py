"""Which mechanism captures and which one exempts the node's probes: tried, chosen, and recorded for the next start."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from agent.backends.base import Support
from agent.backends.choose import Choice, Recorded, Trials, choose, choose_host
from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.ztunnels import Ztunnels
from agent.backends.mechanisms import mechanisms
from agent.backends.preflight import examine, lacking
from agent.backends.selftest import selftest_choice
from agent.core.settings import Settings
from agent.kernel import hostview
from agent.sources import recorded


@dataclass(slots=True)
class Chosen:
    """`host` is the mechanism of the probe exemption and why; `support` what each layer said when it was tried."""

    choice: Choice
    host: tuple[str, str]
    support: dict[str, Support] = field(default_factory=dict)


def chosen(settings: Settings, pins: Pins, ztunnels: Ztunnels) -> Chosen:
    """A restart takes the same. Raises SettingsError when nothing that is allowed can be used."""
    view, support = hostview.look(), dict[str, Support]()
    backends = mechanisms(ipv6=settings.ipv6, pins=pins, ztunnels=ztunnels, sizes=settings.bpf_map_sizes)

    def probe(layer: str) -> Support:
        support[layer] = backends[layer].probe()
        return support[layer]

    trials = Trials(
        probe,
        lambda layers: selftest_choice(layers, pins, ipv6=settings.ipv6),
        lambda name: lacking(examine(name, ipv6=settings.ipv6)),
    )
    old = recorded.load(settings.run_dir)
    choice = choose(settings.backend, backends, trials, view, old)
    host, why = choose_host(settings.host_probes, view)
    if not old or (old.backend, old.host, old.release) != (choice.name, host, view.release):
        new = Recorded(choice.name, choice.reason, host, why, view.release, time.time())
        recorded.save(settings.run_dir, new)
    return Chosen(choice, (host, why), support)
