# SPDX-License-Identifier: Apache-2.0
"""`sluice preflight`: tries what this node can do, and shows which backend an agent would choose. Needs no agent."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from agent.backends import preflight
from agent.backends.base import PodLayer, Support
from agent.backends.choose import LAYERS, Choice, Trials, choose, choose_host
from agent.backends.ebpf.pins import Pins
from agent.backends.preflight import Feature
from agent.backends.registry import mechanisms
from agent.backends.selftest import selftest_choice
from agent.cli import options
from agent.core.errors import SettingsError
from agent.core.model.host import HostTable, HostView
from agent.core.settings import BACKENDS
from agent.core.text import pairs, table
from agent.kernel import host_view
from agent.sources.state import backend_record


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "preflight",
        help="try what this node's kernel can do for each backend; exit 1 if something needed is missing",
    )
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="as the setting (default: auto)")
    parser.add_argument("--no-ipv6", action="store_true", help="as the setting ipv6: false")
    options.finish(parser, _run, options.run_dir, options.bpf_dir, options.output)


class _Tried:
    """Records the trials of the choice. Beyond those only eBPF is shown: the rest might load modules."""

    def __init__(self, ipv6: bool, pins: Pins) -> None:
        self.ipv6 = ipv6
        self.pins = pins
        self.backends = mechanisms(ipv6=ipv6, pins=pins)
        self.support: dict[str, Support] = {}
        self.findings: dict[str, tuple[str, ...]] = {}

    def probe(self, layer: str) -> Support:
        self.support[layer] = self.backends[layer].probe()
        return self.support[layer]

    def test(self, layers: Sequence[PodLayer]) -> tuple[str, ...]:
        name = next(name for name, members in LAYERS.items() if members[-1] == layers[-1].name)
        self.findings[name] = selftest_choice(layers, self.pins, ipv6=self.ipv6)
        return self.findings[name]

    def features(self) -> tuple[Feature, ...]:
        """Returns the features of the choices with probed layers, and of eBPF."""
        names = [name for name, layers in LAYERS.items() if layers[-1] in self.support or name == "ebpf"]
        attempt = partial(preflight.attempt, bpf_dir=str(self.pins.root))
        return preflight.merge(*(preflight.examine(name, ipv6=self.ipv6, attempt=attempt) for name in names))


def _run(args: argparse.Namespace) -> int:
    options.require_root("sluice preflight creates network namespaces for its trials")
    view = host_view.read_host_view()
    tried = _Tried(not args.no_ipv6, Pins.of(args.bpf_dir))
    choice = None
    problem = ""
    try:
        trials = Trials(tried.probe, tried.test)
        choice = choose(args.backend, tried.backends, trials, view, backend_record.load(args.run_dir))
    except SettingsError as error:
        problem = str(error)
    features = tried.features()
    value = _value(view, choice, problem, tried, features)
    options.emit(args.output, value, _text(view, value, features))
    wanted = {choice.name} if choice else set(LAYERS)
    broken = any(one.lacking and wanted & set(one.needed_by) for one in features)
    return 1 if choice is None or broken else 0


def _value(
    view: HostView, choice: Choice | None, problem: str, tried: _Tried, features: tuple[Feature, ...]
) -> dict[str, Any]:
    host = choose_host("auto", view) if choice else ("", "")
    return {
        "backend": choice.name if choice else "",
        "reason": choice.reason if choice else problem,
        "host_probes": host[0],
        "host_probes_reason": host[1],
        "selftest": tried.findings,
        "features": [asdict(one) for one in features],
        "host": {
            "release": view.release,
            "ipv6": view.ipv6,
            "nf_tables": view.nf_tables.value,
            "iptables": view.iptables.value,
            "programs": dict(view.programs),
            "tables": None if view.nft is None else [asdict(one) for one in view.nft],
            "legacy_tables": None if view.legacy is None else [asdict(one) for one in view.legacy],
            "remarks": view.remarks,
        },
    }


def _text(view: HostView, value: dict[str, Any], features: tuple[Feature, ...]) -> str:
    passed = "packets are captured, and are not after removal"
    tests = {name: "; ".join(found) or passed for name, found in value["selftest"].items()}
    rows = [
        ("Backend", f"{value['backend'] or 'none'} ({value['reason']})"),
        ("Host probes", f"{value['host_probes']} ({value['host_probes_reason']})" if value["backend"] else "none"),
        *((f"Self-test {name}", words) for name, words in tests.items()),
        ("Kernel", f"{view.release}, nf_tables {view.nf_tables.value}, IPv6 {'on' if view.ipv6 else 'off'}"),
        ("iptables", view.iptables.value),
        ("Host tables", _tables(view.nft)),
        ("Legacy tables", _tables(view.legacy)),
        *(("Remark", words) for words in view.remarks),
    ]
    cells = [(one.name, ",".join(one.needed_by), *_result(one)) for one in features]
    return f"{pairs(rows)}\n\n{table(('FEATURE', 'NEEDED BY', 'PRESENT', 'WHAT TO DO'), cells)}"


def _result(one: Feature) -> tuple[str, str]:
    if one.present:
        return "yes", ""
    words = [one.words, one.remedy, *([f"else {one.without}"] if one.without else [])]
    return "no" if one.without else "MISSING", "; ".join(words)


def _tables(tables: tuple[HostTable, ...] | None) -> str:
    if tables is None:
        return "unknown"
    shown = (f"{one.family} {one.name}{' of iptables' if one.xtables else ''} ({one.rules} rules)" for one in tables)
    return ", ".join(shown) or "none"
