# SPDX-License-Identifier: Apache-2.0
"""`sluice preflight`: tries what this node can do, and shows which backend an agent would choose. Needs no agent."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

from agent.backends.choose import LAYERS, Choice, choose, choose_host
from agent.backends.ebpf.pins import Pins
from agent.backends.kernel_features import Feature, merge
from agent.backends.trials import KernelTrials
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


def _run(args: argparse.Namespace) -> int:
    options.require_root("sluice preflight creates network namespaces for its trials")
    view = host_view.read_host_view()
    tried = KernelTrials(Pins.of(args.bpf_dir), ipv6=not args.no_ipv6)
    choice = None
    problem = ""
    try:
        trials = replace(tried.trials, explain=lambda _: ())  # the table of features says it
        choice = choose(args.backend, tried.backends, trials, view, backend_record.load(args.run_dir))
    except SettingsError as error:
        problem = str(error)
    # Of the layers that were not tried only those of eBPF are: the rest might load modules.
    names = [name for name, layers in LAYERS.items() if layers[-1] in tried.support or name == "ebpf"]
    features = merge(*map(tried.features, names))
    value = _value(view, choice, problem, tried, features)
    options.emit(args.output, value, _text(view, value, features))
    wanted = {choice.name} if choice else set(LAYERS)
    broken = any(one.lacking and wanted & set(one.needed_by) for one in features)
    return 1 if choice is None or broken else 0


def _value(
    view: HostView, choice: Choice | None, problem: str, tried: KernelTrials, features: tuple[Feature, ...]
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
    tests = {name: "; ".join(failures) or passed for name, failures in value["selftest"].items()}
    rows = [
        ("Backend", f"{value['backend'] or 'none'} ({value['reason']})"),
        ("Host probes", f"{value['host_probes']} ({value['host_probes_reason']})" if value["backend"] else "none"),
        *((f"Self-test {name}", text) for name, text in tests.items()),
        ("Kernel", f"{view.release}, nf_tables {view.nf_tables.value}, IPv6 {'on' if view.ipv6 else 'off'}"),
        ("iptables", view.iptables.value),
        ("Host tables", _tables(view.nft)),
        ("Legacy tables", _tables(view.legacy)),
        *(("Remark", text) for text in view.remarks),
    ]
    cells = [(one.name, ",".join(one.needed_by), *_result(one)) for one in features]
    return f"{pairs(rows)}\n\n{table(('FEATURE', 'NEEDED BY', 'PRESENT', 'WHAT TO DO'), cells)}"


def _result(one: Feature) -> tuple[str, str]:
    if one.present:
        return "yes", ""
    parts = [one.words, one.remedy, *([f"else {one.without}"] if one.without else [])]
    return "no" if one.without else "MISSING", "; ".join(parts)


def _tables(tables: tuple[HostTable, ...] | None) -> str:
    if tables is None:
        return "unknown"
    shown = (f"{one.family} {one.name}{' of iptables' if one.xtables else ''} ({one.rules} rules)" for one in tables)
    return ", ".join(shown) or "none"
