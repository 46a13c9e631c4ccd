# SPDX-License-Identifier: Apache-2.0
"""Two labels of Istio's TCP metrics: the end that counts a connection, and why the connection failed. Pure."""

from __future__ import annotations

from enum import Enum


class Reporter(Enum):
    """The end that counts the connection: of an outbound one its source, of an inbound one its destination."""

    SOURCE = "source"
    DESTINATION = "destination"

    @property
    def direction(self) -> str:
        """Returns outbound or inbound."""
        return "outbound" if self is Reporter.SOURCE else "inbound"


class ResponseFlag(Enum):
    """Why a connection failed."""

    NONE = "-"
    DENIED = "DENY"
    CONNECT = "CONNECT"
    TLS_FAILURE = "TLS_FAILURE"
    H2_HANDSHAKE = "H2_HANDSHAKE_FAILURE"
    NETWORK_POLICY = "NETWORK_POLICY"
    IDENTITY = "IDENTITY_ERROR"
    REVOKED = "CERT_REVOKED"
