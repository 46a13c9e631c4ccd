# SPDX-License-Identifier: Apache-2.0
"""What is read when, forgotten when, and noted; over a kernel of the test."""

from __future__ import annotations

from typing import Any, cast

import pytest

from agent.core.errors import KernelError
from agent.core.model.sockets import TcpSocket, TcpState
from agent.core.policy.backend_switch import translated
from agent.kernel.pod_netns import PodNetns
from agent.sources import preexisting_connections
from agent.sources.preexisting_connections import PreexistingConnections

ONE, TWO, THREE = (
    TcpSocket(4, ("10.0.0.1", 40000 + n), ("10.0.0.2", 80), TcpState.ESTABLISHED, cookie=n) for n in (1, 2, 3)
)
Answer = list[TcpSocket] | KernelError


class Kernel:
    """Stands for a pod, its namespace and its sock_diag; gives its answers one after the other."""

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.open, self.opened = list(answers), 0, 0
        self.netns = self

    def call(self, function: object) -> Kernel:
        assert function is preexisting_connections.SockDiag
        self.open, self.opened = self.open + 1, self.opened + 1
        return self

    def both(self, states: Any) -> list[TcpSocket]:
        assert self.open and TcpState.SYN_SENT in states and TcpState.LISTEN not in states
        answer = self.answers.pop(0)
        if isinstance(answer, KernelError):
            raise answer
        return answer

    def close(self) -> None:
        self.open -= 1

    @property
    def target(self) -> PodNetns:
        return cast("PodNetns", self)


def enrolled(*answers: Answer) -> tuple[PreexistingConnections, Kernel]:
    kernel, made = Kernel(*answers), PreexistingConnections()
    made.begin("u", kernel.target)
    made.applied("u", kernel.target)
    return made, kernel


def test_a_pod_without_connections_costs_nothing_afterwards() -> None:
    made, kernel = enrolled([], [], [])
    assert (kernel.open, kernel.opened) == (0, 1)
    assert made.remaining("u", kernel.target) == () and kernel.opened == 1
    assert made.remaining("other", Kernel().target) == ()


def test_one_socket_is_open_until_the_last_connection_has_ended() -> None:
    made, kernel = enrolled([ONE], [ONE, TWO], [ONE, TWO])
    assert made.as_note("u") == [1, 2] and (kernel.open, kernel.opened) == (1, 1)
    kernel.answers = [[TWO], [TWO]]
    assert made.remaining("u", kernel.target) == (TWO,) and made.as_note("u") == [2]
    kernel.answers = [[THREE], [THREE]]
    assert made.remaining("u", kernel.target) == ()
    assert (kernel.open, kernel.opened, made.as_note("u")) == (0, 1, [])


def test_one_that_a_dump_missed_is_not_forgotten() -> None:
    made, kernel = enrolled([ONE, TWO], [ONE, TWO], [ONE, TWO])
    kernel.answers = [[ONE], [TWO]]
    assert set(made.remaining("u", kernel.target)) == {ONE, TWO}
    kernel.answers = [[ONE, TWO]]  # nothing missing: read once
    assert set(made.remaining("u", kernel.target)) == {ONE, TWO}


def test_one_that_is_missing_right_after_the_rules_is_looked_for_again() -> None:
    made, _ = enrolled([ONE, TWO], [ONE], [TWO])
    assert made.as_note("u") == [1, 2]
    made, _ = enrolled([ONE, TWO], [ONE], [ONE])
    assert made.as_note("u") == [1]


def test_a_handshake_that_ends_during_a_dump_is_found_in_the_next() -> None:
    """The dump comes to the place of ztunnel's end before that is there, and to the client's after the handshake."""
    client = TcpSocket(4, ("10.0.0.1", 40000), ("10.0.0.2", 80), TcpState.ESTABLISHED, cookie=1)
    ztunnel = TcpSocket(4, ("127.0.0.1", 15001), ("10.0.0.1", 40000), TcpState.ESTABLISHED, cookie=2)
    made, kernel = PreexistingConnections(translated), Kernel([], [client], [client, ztunnel])
    made.begin("u", kernel.target)
    assert set(made.applied("u", kernel.target)) == {client, ztunnel}


def test_the_note_is_complete_before_the_rules_come() -> None:
    made, kernel = PreexistingConnections(), Kernel([ONE])
    made.begin("u", kernel.target)
    assert made.as_note("u") == [1]


def test_a_pass_that_is_tried_again_keeps_what_the_first_one_saw() -> None:
    made, kernel = PreexistingConnections(), Kernel([ONE], [TWO], [ONE, TWO], [ONE, TWO])
    made.begin("u", kernel.target)
    made.begin("u", kernel.target)
    assert set(made.applied("u", kernel.target)) == {ONE, TWO} and kernel.opened == 1


def test_a_successor_goes_on_with_the_note() -> None:
    made, kernel = PreexistingConnections(), Kernel([ONE, TWO], [ONE, TWO])
    made.restore("u", [1, 77])
    assert made.as_note("u") == [1, 77] and kernel.opened == 0
    assert made.remaining("u", kernel.target) == (ONE,) and made.as_note("u") == [1]
    made.restore("v", [])
    assert made.remaining("v", Kernel().target) == ()


@pytest.mark.parametrize("end", ["forget", "close"])
def test_nothing_is_left_open(end: str) -> None:
    made, kernel = enrolled([ONE], [ONE], [ONE])
    assert kernel.open == 1
    made.forget("u") if end == "forget" else made.close()
    assert kernel.open == 0 and made.as_note("u") == []
    made.forget("u")


def test_a_refusal_of_the_kernels_forgets_nothing() -> None:
    made, kernel = enrolled([ONE], [ONE], [ONE])
    kernel.answers = [KernelError("read", 1, "no")]
    with pytest.raises(KernelError):
        made.remaining("u", kernel.target)
    assert made.as_note("u") == [1]
    kernel.answers = [[ONE]]
    assert made.remaining("u", kernel.target) == (ONE,)


def test_applied_without_begin_reads_what_is_known() -> None:
    made, kernel = PreexistingConnections(), Kernel([ONE, TWO])
    made.restore("u", [2])
    assert made.applied("u", kernel.target) == (TWO,)
