# SPDX-License-Identifier: Apache-2.0
"""The lab with identities, as `sluice lab up` builds it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.node import until

from agent.lab.lab import Lab, down
from agent.lab.lab_spec import PodProgram, default_spec
from agent.lab.traffic import read_records

pytestmark = pytest.mark.root
PREFIX = "slumesh"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    down(PREFIX)
    lab = Lab(default_spec(PREFIX), mesh=True)
    lab.up()
    try:
        yield lab
    finally:
        down(PREFIX)


def call(lab: Lab, client: str, server: str) -> str:
    """One request; returns the server's address."""
    address = lab.pods.require(server).address(PodProgram.WEB)
    lab.exec(client, ["curl", "-sS", "-m", "5", f"http://{address}/"])
    return address


@pytest.mark.parametrize(
    ("client", "server", "kinds"),
    [
        ("shop/client", "shop/db", {("outbound", "hbone"), ("inbound", "hbone")}),
        ("shop/client", "shop/web", {("outbound", "hbone"), ("inbound", "hbone")}),
        ("shop/client", "legacy/batch", {("outbound", "tcp")}),
        ("legacy/batch", "shop/db", {("inbound", "tcp")}),
    ],
)
def test_the_first_connection_between_enrolled_pods_goes_by_hbone(
    lab: Lab, client: str, server: str, kinds: set[tuple[str, str]]
) -> None:
    address = call(lab, client, server)
    source = lab.pods.require(client).ipv4

    def found() -> set[tuple[str, str]]:
        return {
            (record["direction"], record["kind"])
            for record in read_records(lab)
            if record["destination"] == address and record["source"].startswith(f"{source}:")
        }

    until(lambda: found() == kinds, f"{found()} are {kinds}")
