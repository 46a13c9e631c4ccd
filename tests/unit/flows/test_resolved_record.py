# SPDX-License-Identifier: Apache-2.0
"""Records: who is at both ends, and their form; and which are kept when not all are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from agent.core.model.pods import Pod
from agent.flows.identity import Identities, Service, Workload
from agent.flows.journal import sampled
from agent.flows.record import Closer, Connection, Direction, Fate, How, Reason
from agent.flows.resolved_record import ResolvedRecord, named

POD = Pod("u1", "shop", "web-7", addresses=("10.0.0.1",), labels={"service.istio.io/workload-name": "web"})
OUT = Connection(
    pod=1,
    socket=99,
    direction=Direction.OUTBOUND,
    fate=Fate.CAPTURED,
    reason=Reason.NONE,
    local=("10.0.0.1", 40000),
    remote=("10.96.0.1", 80),
    opened=1000.25,
    closed=1002.75,
    peer=("127.0.0.1", 15001),
    sent=10,
    received=20,
    rtt=0.0001,
    how=How.FIN,
    closer=Closer.REMOTE,
    user=1000,
    process=7,
    command="curl",
)


@pytest.fixture
def identities() -> Identities:
    made = Identities()
    made.know_pods([POD])
    made.know_peers(
        {"10.0.1.9": Workload("db", "bank"), "127.0.0.1": Workload("wrong")},
        {("10.96.0.1", 80): Service("api.bank.svc.cluster.local", "api", "bank")},
    )
    return made


def test_a_record_has_everything_in_this_order(identities: Identities) -> None:
    told = named(OUT, POD, identities, "n1").as_dict()
    assert list(told.items())[:8] == [
        ("time", "1970-01-01T00:16:42.750Z"), ("node", "n1"), ("pod", "web-7"), ("namespace", "shop"),
        ("workload", "web"), ("remote_workload", ""), ("remote_namespace", "bank"), ("remote_service", "api"),
    ]  # fmt: skip
    assert dict(list(told.items())[8:]) == OUT.as_dict() | {"outcome": "ok"}
    assert json.loads(json.dumps(told)) == told


def test_the_time_of_an_open_one_is_when_it_began(identities: Identities) -> None:
    told = named(replace(OUT, closed=None), POD, identities, "n1").as_dict()
    assert (told["time"], told["closed"], told["duration"]) == ("1970-01-01T00:16:40.250Z", None, None)


def test_names_of_the_other_end(identities: Identities) -> None:
    def remote(connection: Connection) -> tuple[str, str, str]:
        found = named(connection, POD, identities, "n1")
        return found.remote_workload, found.remote_namespace, found.remote_service

    assert remote(replace(OUT, remote=("10.0.1.9", 5432))) == ("db", "bank", "")
    assert remote(replace(OUT, remote=("192.0.2.1", 80))) == ("", "", ""), "ztunnel's address names nobody"
    behind = replace(OUT, fate=Fate.EXEMPT, peer=("10.0.1.9", 5432))
    assert remote(behind) == ("db", "bank", "api"), "the endpoint behind a service's address"
    inbound = replace(OUT, direction=Direction.INBOUND, peer=None)
    assert remote(inbound) == ("", "", ""), "a client's port is no service's"
    assert remote(replace(inbound, remote=("10.0.0.1", 80))) == ("web", "shop", "")


def test_a_pod_that_is_forgotten(identities: Identities) -> None:
    assert named(OUT, None, identities, "n1") == ResolvedRecord(
        connection=OUT,
        node="n1",
        pod="",
        namespace="",
        workload="",
        remote_workload="",
        remote_namespace="bank",
        remote_service="api",
    )


@pytest.mark.parametrize("one_in", [2, 10, 100])
@pytest.mark.parametrize("step", [1, 2, 64, 4096])
def test_samples_are_even_also_of_regular_cookies_and_always_the_same(one_in: int, step: int) -> None:
    all_of_them = [replace(OUT, socket=1 + number * step) for number in range(4000)]
    kept = [each for each in all_of_them if sampled(each, one_in)]
    assert 0.7 * 4000 / one_in < len(kept) < 1.3 * 4000 / one_in
    assert kept == [each for each in all_of_them if sampled(each, one_in)]


def test_leaked_and_failed_ones_are_always_kept() -> None:
    for number in range(100):
        assert sampled(replace(OUT, socket=number), 1)
        assert sampled(replace(OUT, socket=number, fate=Fate.LEAKED), 1_000_000)
        assert sampled(replace(OUT, socket=number, established=False, fate=Fate.UNDECIDED), 1_000_000)
