# SPDX-License-Identifier: Apache-2.0
"""The text of the families, read by the parsers of Prometheus' own library: every value comes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from agent.export import exposition
from agent.flows.identity import Service, Workload
from agent.flows.label_totals import Fated, Measured, Snapshot, TrafficTotals
from agent.flows.labels import fated, owner, traffic
from agent.flows.record import DURATION_BOUNDS, RTT_BOUNDS, Direction, Fate, Reason
from agent.kernel import http

OUT = Direction.OUTBOUND
WEB = Workload("web", "shop", service_account="robot")
RTT = tuple(range(len(RTT_BOUNDS) + 1))
DURATION = tuple(range(10, len(DURATION_BOUNDS) + 11))


def snapshot(name: str = "db") -> Snapshot:
    opened = traffic(OUT, WEB, Workload(name, name), Service(name, name, name), "td")
    failed = traffic(OUT, WEB, None, None, "td")
    return Snapshot(
        [
            TrafficTotals(labels=opened, opened=3, closed=2, failed=0, sent=2**53 + 1, received=7),
            TrafficTotals(labels=failed, opened=0, closed=0, failed=4, sent=0, received=0),
        ],
        [
            Fated(fated("shop", name, OUT, Fate.LEAKED, Reason.RAW), 5, 77, 1700000000.1239),
            Fated(fated("shop", name, OUT, Fate.CAPTURED, Reason.NONE), 6, 0, 0.0),
        ],
        [
            Measured(
                labels=owner("shop", name, OUT),
                rtt=RTT,
                rtt_sum=1.25,
                duration=DURATION,
                duration_sum=99.5,
                retransmitted=8,
            )
        ],
        {"traffic": 1},
    )


def families(openmetrics: bool, name: str = "db") -> dict[str, Metric]:
    body = exposition.connections(snapshot(name), [("records", 9)], openmetrics=openmetrics)
    page = exposition.joined(b"", body, openmetrics=openmetrics).decode()
    parsed = list(parse_openmetrics(page) if openmetrics else parse_plain(page))
    assert len({family.name for family in parsed}) == len(parsed)
    return {family.name: family for family in parsed}


@pytest.mark.parametrize("openmetrics", [False, True])
def test_every_counter_comes_back(openmetrics: bool) -> None:
    found = families(openmetrics)
    want = {
        "istio_tcp_connections_opened": [3],
        "istio_tcp_connections_closed": [2],
        "istio_tcp_connections_failed": [4],
        "istio_tcp_sent_bytes": [2**53 + 1],
        "istio_tcp_received_bytes": [7],
        "sluice_connections": [5, 6],
        "sluice_tcp_retransmitted_segments": [8],
        "sluice_records_lost": [9],
        "sluice_metrics_overflow": [1],
    }
    for name, values in want.items():
        assert found[name].type == "counter" and found[name].documentation
        assert [sample.name for sample in found[name].samples] == [f"{name}_total"] * len(values)
        assert [sample.value for sample in found[name].samples] == values, "to the last digit"
    assert found.keys() == want.keys() | {"sluice_tcp_rtt_seconds", "sluice_tcp_connection_duration_seconds"}
    assert found["sluice_records_lost"].samples[0].labels == {"cause": "records"}


@pytest.mark.parametrize("openmetrics", [False, True])
def test_what_failed_says_so_and_has_no_series_of_open_connections(openmetrics: bool) -> None:
    found = families(openmetrics)
    (failed,), (opened,) = (found[f"istio_tcp_connections_{kind}"].samples for kind in ("failed", "opened"))
    assert (failed.labels["response_flags"], opened.labels["response_flags"]) == ("CONNECT", "-")
    for sample, destination in ((failed, "unknown"), (opened, "db")):
        assert len(sample.labels) == 23 and sample.labels["destination_workload"] == destination
        assert sample.labels["request_protocol"] == "tcp"
        assert sample.labels["connection_security_policy"] == "unknown"


@pytest.mark.parametrize("openmetrics", [False, True])
def test_histograms_are_cumulative(openmetrics: bool) -> None:
    found = families(openmetrics)
    for name, bounds, counts, total in (
        ("sluice_tcp_rtt_seconds", RTT_BOUNDS, RTT, 1.25),
        ("sluice_tcp_connection_duration_seconds", DURATION_BOUNDS, DURATION, 99.5),
    ):
        assert found[name].type == "histogram"
        buckets = [one for one in found[name].samples if one.name.endswith("_bucket")]
        assert [float(one.labels["le"]) for one in buckets] == [*bounds, float("inf")]
        assert [one.value for one in buckets] == [sum(counts[: n + 1]) for n in range(len(counts))]
        rest = {one.name: one.value for one in found[name].samples if "le" not in one.labels}
        assert rest == {f"{name}_sum": total, f"{name}_count": sum(counts)}


def test_the_exemplar_is_the_latest_socket_and_only_openmetrics_has_it() -> None:
    leaked, captured = families(True)["sluice_connections"].samples
    assert leaked.exemplar is not None and captured.exemplar is None
    assert (leaked.exemplar.labels, leaked.exemplar.value) == ({"socket": "77"}, 1)
    assert float(leaked.exemplar.timestamp) == 1700000000.124
    assert b"# {" not in b"".join(exposition.connections(snapshot(), [], openmetrics=False))


@pytest.mark.parametrize("openmetrics", [False, True])
@pytest.mark.parametrize("name", ['"', "\\", "\n", '\\n"', 'a"} 1\nfake_total{x="y', "\r\t", "é✓", "# EOF", '\\\\"'])
def test_hostile_names(name: str, openmetrics: bool) -> None:
    found = families(openmetrics, name)
    assert found["istio_tcp_sent_bytes"].samples[0].labels["destination_workload"] == name
    assert {sample.labels["workload"] for sample in found["sluice_connections"].samples} == {name}
    assert "fake" not in found


@given(st.text(min_size=1))
def test_any_name_comes_back(name: str) -> None:
    """Names of pods come from whoever may make them; one must not spoil the page."""
    (sample,) = families(False, name)["istio_tcp_sent_bytes"].samples
    assert sample.labels["destination_workload"] == name


def test_what_utf8_cannot_carry_is_replaced() -> None:
    assert families(True, "a\ud800b")["istio_tcp_sent_bytes"].samples[0].labels["destination_workload"] == "a?b"


def test_an_empty_tally_is_valid() -> None:
    for openmetrics in (False, True):
        body = exposition.connections(Snapshot([], [], [], {}), [], openmetrics=openmetrics)
        page = exposition.joined(b"", body, openmetrics=openmetrics).decode()
        assert not [s for f in (parse_openmetrics if openmetrics else parse_plain)(page) for s in f.samples]


PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;"
    "q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        (PROMETHEUS_2, True),
        (PROMETHEUS_3, True),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text; Version=1.0.0 , text/plain", True),
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=x", False),
        ("application/openmetrics-text;q=nan", False),
        ("application/openmetrics-text;version=0.0.1", False),
        ("application/openmetrics-text;version=2.0.0", False),
        ("application/openmetrics-text;q=0.1,text/plain;q=0.2", False),
        (";;=,,", False),
    ],
)
def test_the_format_that_is_asked_for(accept: str, openmetrics: bool) -> None:
    assert http.wants_openmetrics(accept) is openmetrics
