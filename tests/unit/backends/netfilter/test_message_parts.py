# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from agent.backends.netfilter.message_parts import text


def test_a_name_of_a_pods_own_table_is_shown_in_one_line_without_escapes() -> None:
    assert text(b"x\n\x1b[31mOK\xff\0") == "x\\n\\x1b[31mOK\ufffd"
    assert text(b"istio-prerouting\0") == "istio-prerouting"
