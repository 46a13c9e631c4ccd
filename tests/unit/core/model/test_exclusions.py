# SPDX-License-Identifier: Apache-2.0
"""Exclusions from annotations: merged, checked, and refused as a whole when anything in them is wrong."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.model.exclusions import Exclusions, exclusions, merged, networks, ports, users
from agent.core.model.pods import Pod
from agent.core.policy.decide import decide
from agent.core.settings import Settings


def parsed(annotations: dict[str, str], *, sidecar: bool = False) -> tuple[Exclusions, list[str]]:
    warnings: list[str] = []
    return exclusions(annotations, sidecar=sidecar, warnings=warnings), warnings


def test_every_annotation_is_read() -> None:
    found, warnings = parsed(
        {
            "traffic.sluice.io/exclude-outbound-ports": "8000-9000, 80,81",
            "traffic.sluice.io/exclude-inbound-ports": "22",
            "traffic.sluice.io/exclude-outbound-cidrs": "10.1.2.3/8, fd00::/8, 192.0.2.1",
            "traffic.sluice.io/exclude-inbound-cidrs": "172.16.0.0/12",
            "traffic.sluice.io/exclude-outbound-uids": "0,1000:2000",
            "traffic.sluice.io/exclude-interfaces": "eth1, net1,eth1",
        }
    )
    assert warnings == []
    assert found == Exclusions(
        outbound_ports=((80, 81), (8000, 9000)),
        inbound_ports=((22, 22),),
        outbound_networks=("10.0.0.0/8", "192.0.2.1/32", "fd00::/8"),
        inbound_networks=("172.16.0.0/12",),
        users=((0, 0), (1000, 2000)),
        interfaces=("eth1", "net1"),
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("exclude-outbound-ports", value)
        for value in ("0", "65536", "80-", "90-80", "http", "-1", "80;reboot", "8\u0660", "80 81", "*", "1" * 11)
    ]
    + [("exclude-outbound-cidrs", value) for value in ("10.0.0.0/33", "x", "fe80::1%eth0", "10.0.0.0/8/8", "*")]
    + [("exclude-outbound-uids", value) for value in ("root", str(2**32 - 1), "-5")]
    + [("exclude-interfaces", value) for value in ("-j", "a b", "x" * 16, "eth+", "a;b")]
    + [("exclude-inbound-ports", ",".join(str(n) for n in range(1, 600, 2)))],
)
def test_what_is_wrong_excludes_nothing_and_is_told(key: str, value: str) -> None:
    found, (warning,) = parsed({f"traffic.sluice.io/{key}": value, "traffic.sluice.io/other": "1"})
    assert found == Exclusions() and key in warning and len(warning) < 200


def test_a_bad_entry_refuses_its_whole_annotation_and_no_other() -> None:
    found, warnings = parsed(
        {"traffic.sluice.io/exclude-outbound-ports": "80,x", "traffic.sluice.io/exclude-inbound-ports": "22"}
    )
    assert found == Exclusions(inbound_ports=((22, 22),)) and len(warnings) == 1


def test_the_sidecars_annotations_count_only_where_the_setting_says_so_and_ours_win() -> None:
    theirs = {
        "traffic.sidecar.istio.io/excludeOutboundPorts": "80",
        "traffic.sidecar.istio.io/excludeOutboundIPRanges": "10.0.0.0/8",
        "traffic.sidecar.istio.io/excludeInboundPorts": "22",
        "traffic.sidecar.istio.io/excludeInterfaces": "net1",
    }
    assert parsed(theirs) == (Exclusions(), [])
    every = Exclusions(
        outbound_ports=((80, 80),),
        inbound_ports=((22, 22),),
        outbound_networks=("10.0.0.0/8",),
        inbound_networks=(),
        users=(),
        interfaces=("net1",),
    )
    assert parsed(theirs, sidecar=True) == (every, [])
    both = {**theirs, "traffic.sluice.io/exclude-outbound-ports": "443"}
    assert parsed(both, sidecar=True)[0].outbound_ports == ((443, 443),)


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(0, 30)), max_size=20))
def test_merged_ranges_hold_the_same_numbers_apart_and_in_order(pairs: list[tuple[int, int]]) -> None:
    given_ranges = [(first, first + more) for first, more in pairs]
    found = merged(given_ranges)
    assert {n for a, b in found for n in range(a, b + 1)} == {n for a, b in given_ranges for n in range(a, b + 1)}
    assert all(left[1] + 1 < right[0] for left, right in itertools.pairwise(found))


@given(st.text(max_size=30))
def test_no_text_gets_through_that_is_not_plain_numbers_and_addresses(text: str) -> None:
    for parse in (ports, users):
        with contextlib.suppress(ValueError):
            assert all(0 <= first <= last < 2**32 for first, last in parse(text))
    with contextlib.suppress(ValueError):
        assert all(str(ipaddress.ip_network(found)) == found for found in networks(text))


def pod(**facts: object) -> Pod:
    annotations = {"istio.io/dataplane-mode": "ambient", **facts.pop("annotations", {})}  # type: ignore[dict-item]
    return Pod("u", "shop", "web", annotations=annotations, **facts)  # type: ignore[arg-type]


def test_the_intent_carries_them_and_the_decision_the_warnings() -> None:
    decision = decide(pod(annotations={"traffic.sluice.io/exclude-outbound-ports": "80"}), Settings())
    assert decision.redirect is not None and decision.redirect.exclude.outbound_ports == ((80, 80),)
    decision = decide(pod(annotations={"traffic.sluice.io/exclude-outbound-ports": "x"}), Settings())
    assert decision.enrolled and "exclude-outbound-ports" in decision.warnings[0]


def test_dns_towards_resolvers_only_and_towards_all_when_none_is_known() -> None:
    here = Settings(dns_capture_to="resolvers", dns_resolvers=("10.96.0.10",))

    def to(one: Pod, settings: Settings) -> tuple[str, ...]:
        redirect = decide(one, settings).redirect
        assert redirect is not None
        return redirect.dns_to

    assert to(pod(), Settings()) == ()
    assert to(pod(resolvers=("fd00::a", "8.8.8.8")), here) == ("8.8.8.8", "fd00::a")
    assert to(pod(), here) == ("10.96.0.10",)
    nobody = Settings(dns_capture_to="resolvers")
    assert to(pod(resolvers=("127.0.0.53",)), nobody) == ()
    assert "no resolver" in decide(pod(), nobody).warnings[0]
