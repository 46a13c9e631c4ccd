# SPDX-License-Identifier: Apache-2.0
"""The import contracts of pyproject.toml name every package and every pure module of the tree."""

from __future__ import annotations

import ast
import graphlib
import tomllib
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
MODULES = {
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((REPO / "agent").rglob("*.py"))
}
PACKAGES = {f"agent.{path.name}" for path in (REPO / "agent").iterdir() if (path / "__init__.py").exists()}
CONTRACTS: dict[str, dict[str, Any]] = {
    one["name"]: one
    for one in tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}
TOP = PACKAGES | {"agent.__main__"}


def sources(contract: str) -> set[str]:
    return set(CONTRACTS[contract]["source_modules"])


def test_every_package_stands_in_a_layer() -> None:
    """But ztunnel, a program of its own, which two contracts keep apart."""
    layers = {part.strip() for layer in CONTRACTS["Dependencies point one way"]["layers"] for part in layer.split("|")}
    assert layers == TOP - {"agent.ztunnel"}


def test_every_named_module_exists() -> None:
    for contract in CONTRACTS.values():
        named = {name for key in ("source_modules", "forbidden_modules", "modules") for name in contract.get(key, ())}
        assert {name for name in named if name.startswith("agent.")} <= MODULES.keys(), contract["name"]


def test_every_module_that_says_it_is_pure_is_held_to_it() -> None:
    pure = sources("Pure modules do no IO, ask no clock and write no log")
    says = {name for name, path in MODULES.items() if _head(path).endswith(("Pure.", "No IO."))}
    assert {name for name in says if not any(name == one or name.startswith(f"{one}.") for one in pure)} == set()


def test_nobody_but_cli_and_lab_may_import_ztunnel() -> None:
    allowed = {"agent.cli", "agent.lab", "agent.ztunnel", "agent.__main__"}
    assert sources("Nothing but cli and lab imports ztunnel") == TOP - allowed


def test_ztunnel_may_import_core_kernel_and_the_zds_messages() -> None:
    forbidden = set(CONTRACTS["ztunnel uses core, kernel and the ZDS messages alone"]["forbidden_modules"])
    assert forbidden == TOP - {"agent.core", "agent.kernel", "agent.zds", "agent.ztunnel"} | {"agent.zds.server"}


def test_only_kernel_may_call_c_and_start_processes() -> None:
    assert sources("Only kernel calls C") == TOP - {"agent.kernel"}
    starting = {name for name in MODULES if name.startswith("agent.kernel.") and name != "agent.kernel.exec"}
    named = sources("Only kernel.exec starts processes")
    assert TOP - {"agent.kernel"} <= named
    assert all(any(name == one or name.startswith(f"{one}.") for one in named) for name in starting)


def test_only_commands_and_lab_may_import_pyroute2_and_psutil() -> None:
    """Importing pyroute2 costs 10 MB: more than a quarter of what the daemon takes."""
    allowed = {"agent.__main__", "agent.cli", "agent.diagnosis", "agent.lab"}
    assert sources("The daemon and what it imports load neither pyroute2 nor psutil") == TOP - allowed | {
        "agent.cli.agent"
    }


def test_only_ztunnel_commands_and_lab_may_import_libraries_of_ztunnel() -> None:
    """Importing cryptography and h2 costs memory that the daemon has no use for."""
    allowed = {"agent.__main__", "agent.cli", "agent.diagnosis", "agent.lab", "agent.ztunnel"}
    contract = "The daemon and what it imports load no library of ztunnel"
    assert sources(contract) == TOP - allowed | {"agent.cli.agent"}


def test_the_packages_of_backends_do_not_know_one_another() -> None:
    """But hostprobes, which writes nf_tables with what the nftables backend has, and netfilter, which both share."""
    named = {one for one in CONTRACTS["Backends do not know one another"]["modules"] if one in _packages("backends")}
    assert named == _packages("backends") - {"agent.backends.hostprobes", "agent.backends.netfilter"}


def test_modules_do_not_import_in_a_circle() -> None:
    """Counts imports for types and inside functions, too: a circle hides behind them."""
    graph = {name: _imports(path) for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def _imports(path: Path) -> set[str]:
    """The modules of the agent that one imports; `from agent.lab import nodes` counts as agent.lab.nodes."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {node.module}
    return found & MODULES.keys()


def _packages(room: str) -> set[str]:
    folders = (path for path in (REPO / "agent" / room).iterdir() if (path / "__init__.py").exists())
    return {f"agent.{room}.{path.name}" for path in folders}


def _head(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].strip()
