# SPDX-License-Identifier: Apache-2.0
"""Whatever a peers file holds, it is understood or refused with its name; nothing else happens."""

from __future__ import annotations

import ipaddress

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import SettingsError
from agent.flows.labels import traffic
from agent.flows.record import Direction
from agent.flows.remote_workloads import parse

WORKLOAD = ["addresses", "namespace", "name", "workload", "service_account", "app", "version", "cluster", "labels"]
KEYS = ["workloads", "services", *WORKLOAD, "host", "ports", "<<", "x"]
scalars = st.one_of(
    st.sampled_from(["shop", "web", "10.0.0.1", "fd00::1", "80", "~", ""]),
    st.text(max_size=8),
    st.integers(),
    st.none(),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=12,
)
# Right in the main, so that what lies behind the first checks is reached.
entries = st.fixed_dictionaries(
    {
        "addresses": st.lists(st.ip_addresses().map(str), min_size=1, max_size=3),
        "namespace": st.sampled_from(["shop", "bank", "Wrong"]),
        "name": st.sampled_from(["web", "db-0"]),
    },
    optional={
        "app": st.text(max_size=8),
        "labels": st.dictionaries(st.sampled_from(["app", "x"]), st.text(max_size=8)),
    },
)
marks = st.text(alphabet="workladsevi:-[]{}&*!|>'\"\\\n ?,#%@`~0u\t", max_size=60)


def understood_or_refused(text: str) -> None:
    try:
        found = parse(text, "f.yaml")
    except SettingsError as error:
        assert str(error).startswith("f.yaml:")
        return
    for address, workload in found.workloads.items():
        assert str(ipaddress.ip_address(address)) == address and workload.namespace and workload.name
        assert traffic(Direction.INBOUND, None, workload, None, "td").encode()
    for (address, port), service in found.services.items():
        assert str(ipaddress.ip_address(address)) == address and 0 <= port < 65536 and service.host


@given(marks | st.text(max_size=80) | marks.map(lambda text: "workloads:\n- " + text))
def test_any_text(text: str) -> None:
    """Any text is understood or refused with its name."""
    understood_or_refused(text)


@given(st.sampled_from(["workloads", "services"]), st.lists(values | entries, max_size=3))
def test_any_structure(key: str, entries: list[object]) -> None:
    """Any YAML structure is understood or refused with its name."""
    understood_or_refused(yaml.safe_dump({key: entries}))


@pytest.mark.parametrize(
    "text", ["workloads: &a [*a]", "services: [&a {ports: *a}]", "? ? a\n: b", "services: !!binary x"]
)
def test_structures_that_hypothesis_does_not_find(text: str) -> None:
    """References to itself, complex keys and foreign tags are refused with its name."""
    with pytest.raises(SettingsError, match=r"^f\.yaml:"):
        parse(text, "f.yaml")
