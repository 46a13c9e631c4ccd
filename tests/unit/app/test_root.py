# SPDX-License-Identifier: Apache-2.0
"""What the agent cannot start with is one clear line."""

from __future__ import annotations

import socket

import pytest

from agent.app.parts import bind
from agent.core.errors import SettingsError


def test_p60i_a_port_that_is_taken_is_a_hard_error_that_names_the_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(SettingsError, match=f"metrics_address {address}: Address already in use; set another one"):
            bind(address)
    bind(address).close()


def test_an_address_that_is_not_the_nodes_is_named_too() -> None:
    with pytest.raises(SettingsError, match=r"metrics_address 192\.0\.2\.1:15014: Cannot assign requested address"):
        bind("192.0.2.1:15014")
