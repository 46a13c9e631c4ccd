# SPDX-License-Identifier: Apache-2.0
"""The lab with identities, as `sluice lab up` builds it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from support.node import until

from agent.__main__ import main
from agent.kernel.netns import Netns
from agent.lab import lab_mesh
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


def rows(lab: Lab, capsys: pytest.CaptureFixture[str], node: str, pod: str) -> list[dict[str, Any]]:
    """What `sluice connections --wire` prints of a pod."""
    directory = str(lab.spec.node_dir(node))
    assert main(["connections", pod, "--wire", "-o", "json", "--run-dir", directory]) == 0
    answer = json.loads(capsys.readouterr().out)
    return [row for row in answer["ended"] + answer["live"] if row["fate"] == "captured"]


SHOP = "spiffe://cluster.local/ns/shop/sa/default"


def test_connections_show_how_they_went_on_and_to_whom(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    database, batch = call(lab, "shop/client", "shop/db"), call(lab, "shop/client", "legacy/batch")

    def shown(pod: str, node: str, remote: str) -> set[tuple[str, str, str]]:
        found = (row for row in rows(lab, capsys, node, pod) if row["remote"].startswith(remote))
        return {(row["wire"], row["identity"], row["remote_identity"]) for row in found}

    client = lab.pods.require("shop/client").ipv4
    until(lambda: shown("shop/client", "node1", database) == {("hbone", SHOP, SHOP)}, "the client's end")
    until(lambda: shown("shop/db", "node2", client) == {("hbone", SHOP, SHOP)}, "the server's end")
    until(lambda: shown("shop/client", "node1", batch) == {("plaintext", "", "")}, "what is not enrolled")


def test_explain_shows_the_identity_and_the_ways(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    call(lab, "shop/client", "shop/db")

    def shown() -> bool:
        assert main(["explain", "shop/client", "--run-dir", str(lab.spec.node_dir("node1"))]) == 0
        mesh = capsys.readouterr().out.partition("\nMesh\n")[2]
        words = [line.split() for line in mesh.splitlines()[:3]]
        return [line[:4] for line in words[:1]] == [["Identity:", f"{SHOP},", "certificate", "available"]] and [
            line[:3] for line in words[2:]
        ] == [["out", "hbone", SHOP]]

    until(shown, "the pod's identity and its connections by HBONE")


def test_an_open_connection_is_known_even_if_others_went_otherwise(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only while it is open: the count of ended ones does not tell which was which."""
    address = call(lab, "shop/client", "shop/db")
    echo = lab.pods.require("shop/db").address(PodProgram.ECHO)
    host, _, port = echo.rpartition(":")
    with Netns.open(lab.netns("shop/client")) as netns:
        connection = netns.call(lambda: socket.create_connection((host, int(port)), 10))
    with connection:
        local = "{}:{}".format(*connection.getsockname())

        def ways() -> set[str]:
            return {row["wire"] for row in rows(lab, capsys, "node1", "shop/client") if row["local"] == local}

        until(lambda: ways() == {"hbone"}, "the open connection went by HBONE")
        plain = mesh_text(lab).replace("HBONE", "TCP")
        write_mesh(lab, plain)
        try:
            until(lambda: in_plain(lab, address), "the mesh speaks no HBONE any more")
            assert ways() == {"hbone"}
        finally:
            lab_mesh.write(lab.pods)
    until(lambda: ways() == {"unknown"}, "of the ended one it is not known")


def mesh_text(lab: Lab) -> str:
    return (lab.spec.run_dir / "mesh.yaml").read_text()


def write_mesh(lab: Lab, text: str) -> None:
    fresh = lab.spec.run_dir / "mesh.new"
    fresh.write_text(text)
    fresh.replace(lab.spec.run_dir / "mesh.yaml")


def in_plain(lab: Lab, address: str) -> bool:
    call(lab, "shop/client", "shop/db")
    found = [one for one in read_records(lab) if (one["direction"], one["destination"]) == ("outbound", address)]
    return bool(found) and found[-1]["kind"] == "tcp"


def test_without_a_mesh_nothing_is_claimed(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    node = lab.nodes["node1"]
    node.replace_ztunnel("--drain-seconds", "1")
    try:
        call(lab, "shop/client", "shop/db")
        directory = str(lab.spec.node_dir("node1"))

        def captured() -> list[str]:
            assert main(["connections", "shop/client", "--wire", "--run-dir", directory]) == 0
            shown = capsys.readouterr()
            assert "sluice: wire unknown: process" in shown.err and "Connection refused" in shown.err
            return [line.split()[-2] for line in shown.out.splitlines() if " captured " in line]

        until(lambda: set(captured()) == {"unknown"}, "rows without an answer")
    finally:
        node.replace_ztunnel()
