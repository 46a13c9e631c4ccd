# SPDX-License-Identifier: Apache-2.0
"""What the sockets of a pod say about a connection from the node."""

from __future__ import annotations

import pytest

from agent.core.model.sockets import Endpoint, TcpSocket, TcpState
from agent.core.policy.canary import ProbeResult, ProbeVerdict, judge

POD, NODE, PROBE = "10.0.0.1", "10.0.0.254", "169.254.7.127"
TRIED, OWN = (POD, 80), (NODE, 5000)


def tcp(
    local: Endpoint, remote: Endpoint, cookie: int = 1, mark: int = 0, state: TcpState = TcpState.ESTABLISHED
) -> TcpSocket:
    return TcpSocket(4, local, remote, state, cookie, mark=mark)


@pytest.mark.parametrize("remote", [OWN, (PROBE, 5000), (PROBE, 61000)])
@pytest.mark.parametrize("state", [TcpState.ESTABLISHED, TcpState.SYN_RECV, TcpState.FIN_WAIT2, TcpState.CLOSE_WAIT])
def test_the_application_has_it(remote: Endpoint, state: TcpState) -> None:
    assert judge([tcp(TRIED, remote, state=state)], TRIED, OWN, PROBE) == ProbeResult(ProbeVerdict.OK, TRIED)


@pytest.mark.parametrize(
    "one",
    [
        tcp(TRIED, (NODE, 5001)), tcp((POD, 81), OWN), tcp(("10.0.0.2", 80), OWN), tcp(TRIED, ("10.0.0.9", 5000)),
        tcp(TRIED, ("0.0.0.0", 0), state=TcpState.LISTEN),
    ],
)  # fmt: skip
def test_others_connections_say_nothing(one: TcpSocket) -> None:
    assert judge([one], TRIED, OWN, PROBE) is None


@pytest.mark.parametrize("port", [15001, 15006, 15008, 15053])
@pytest.mark.parametrize("remote", [OWN, (PROBE, 5000)])
def test_ztunnel_has_it(port: int, remote: Endpoint) -> None:
    finding = judge([tcp((POD, port), remote, mark=0x539)], TRIED, OWN, PROBE)
    assert finding is not None and (finding.verdict, finding.tried) == (ProbeVerdict.CAPTURED, TRIED)
    assert finding.why == f"redirected to port {port}, as coming from {remote[0]}"


def test_ztunnel_that_has_passed_it_on_has_it() -> None:
    """The application then sees the node's address too, with another port or, who knows, the same."""
    for port in (5000, 9000):
        passed = [tcp((NODE, port), TRIED, 2, 0x539), tcp(TRIED, (NODE, port), 3)]
        finding = judge([tcp((POD, 15006), OWN, mark=0x539), *passed], TRIED, OWN, PROBE)
        assert finding is not None and finding.verdict is ProbeVerdict.CAPTURED
        assert judge(passed, TRIED, OWN, PROBE) is None


def test_another_probe_at_the_same_time_does_not_hide_a_capture() -> None:
    finding = judge([tcp(TRIED, (PROBE, 61000)), tcp((POD, 15006), OWN, 2, 0x539)], TRIED, OWN, PROBE)
    assert finding is not None and finding.verdict is ProbeVerdict.CAPTURED


@pytest.mark.parametrize(
    ("finding", "line"),
    [
        (ProbeResult(ProbeVerdict.OK, TRIED), "probe from the node on 10.0.0.1:80: ok"),
        (ProbeResult(ProbeVerdict.NO_LISTENER), "probe from the node: no listener"),
        (
            ProbeResult(ProbeVerdict.FAILED, ("fd00::1", 80), "Connection refused"),
            "probe from the node on [fd00::1]:80: failed: Connection refused",
        ),
    ],
)
def test_a_line_for_people(finding: ProbeResult, line: str) -> None:
    assert str(finding) == line
