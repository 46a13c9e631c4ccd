# SPDX-License-Identifier: Apache-2.0
"""What every tier shares: who may run it, and the traffic table at the end of the run."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings
from support.traffic.table import Table

TABLE = Table()
settings.register_profile("sluice", deadline=None)  # no test asserts how long anything takes
# CI draws the same examples each time: what is new is looked for by hand, where somebody can take it up.
settings.register_profile("ci", settings.get_profile("sluice"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "sluice")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without root the root tiers are skipped and said to be; in CI that is a failure, not a skip."""
    if os.geteuid() == 0:
        return
    needing = [item for item in items if item.get_closest_marker("root")]
    if needing and os.environ.get("CI"):
        raise pytest.UsageError(f"{len(needing)} tests need root, and in CI none may be skipped: run as root")
    for item in needing:
        item.add_marker(pytest.mark.skip(reason="needs root: network namespaces"))


@pytest.fixture(scope="session")
def traffic_table() -> Table:
    return TABLE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := TABLE.lines():
        terminalreporter.section("traffic table")
        for line in lines:
            terminalreporter.write_line(line)
