# SPDX-License-Identifier: Apache-2.0
"""Whatever a static file holds, it is understood or refused with its name; nothing else happens."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import SettingsError
from agent.sources.static_pods import parse

KEYS = ["pods", "namespace", "name", "netns", "addresses", "uid", "serviceAccount", "labels", "annotations", "<<", "x"]
scalars = st.one_of(
    st.sampled_from(["shop", "web", "/n", "10.0.0.1", "none", "~", ""]), st.text(max_size=8), st.integers(), st.none()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=12,
)
marks = st.text(alphabet="pods:-[]{}&*!|>'\"\\\n ?,#%@`~0xuUa\t", max_size=60)


def understood_or_refused(text: str) -> None:
    try:
        found = parse(text, "f.yaml")
    except SettingsError as error:
        assert str(error).startswith("f.yaml:")
        return
    for uid, pod in found.pods.items():
        assert uid == pod.uid and "/" not in uid and pod.netns_path.startswith("/")
        assert "\0" not in pod.netns_path and pod.service_account.encode() is not None


@given(marks | st.text(max_size=80) | marks.map(lambda text: "pods:\n- " + text))
def test_any_text(text: str) -> None:
    """Any text is understood or refused with its name."""
    understood_or_refused(text)


@given(st.builds(lambda entries: yaml.safe_dump({"pods": entries}), st.lists(values, max_size=3)))
def test_any_structure(text: str) -> None:
    """Any YAML structure is understood or refused with its name."""
    understood_or_refused(text)


@pytest.mark.parametrize("text", ["pods: &a [*a]", "pods: [&a {labels: *a}]", "? ? a\n: b", "pods: !!binary x"])
def test_structures_that_hypothesis_does_not_find(text: str) -> None:
    """References to itself, complex keys and foreign tags are refused with its name."""
    with pytest.raises(SettingsError, match=r"^f\.yaml:"):
        parse(text, "f.yaml")
