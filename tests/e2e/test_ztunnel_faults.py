# SPDX-License-Identifier: Apache-2.0
"""A ztunnel that misbehaves in the middle of an ADD: the ADD fails in bounded time, the pod fails closed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.fakeztunnel import FakeZtunnel
from support.node import Node, NodePod, node, until

from agent.zds.messages import Ack, Add, Hello, Message, Request, encode

pytestmark = pytest.mark.root
ACK, ADD = 0.6, 2.0  # seconds, as set below
BOUND = ADD + 4  # and time for a busy machine

Fault = Callable[[Request], Message | bytes | None]


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with node("slueb") as made:
        made.start(ack_seconds=ACK, add_seconds=ADD, verify_seconds=60.0)
        yield made


def never(_: Request) -> None:
    return None


def late(_: Request) -> Message:
    time.sleep(ACK * 2)
    return Ack()


def dies(_: Request) -> Message:
    raise ConnectionError("it dies")


def garbage(_: Request) -> bytes:
    return b"\xff" * 64


def too_much(_: Request) -> bytes:
    return b"\x0a\x00" * 4096


def refuses(_: Request) -> Message:
    return Ack("no listener could be opened")


def another_message(_: Request) -> Message:
    return Add("x", "x", "x", "x")


FAULTS = [never, late, dies, garbage, too_much, refuses, another_message]


def faulty(fault: Fault, name: str) -> Fault:
    """Good, but for the pod of that name."""

    def answer(request: Request) -> Message | bytes | None:
        return fault(request) if isinstance(request, Add) and request.name == name else Ack()

    return answer


def fake(here: Node, answer: Fault = lambda _: Ack(), **how: Any) -> FakeZtunnel:
    made = FakeZtunnel(here.run_dir / "ztunnel.sock", answer, **how)
    assert made.complete.wait(20)
    return made


def test_no_ztunnel_at_all(here: Node) -> None:
    pod = here.pod("none")
    outcome = here.cni("ADD", pod)
    assert (outcome.error, outcome.seconds < BOUND) == (11, True), outcome.answer
    assert "no ztunnel is connected" in outcome.words
    assert here.state(pod) == "pending"
    assert here.refused(pod)
    assert here.cni("STATUS", pod).error == 51
    here.sluice("verify", pod.key, code=1)
    here.delete(pod)
    assert not here.known(pod)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_alone_it_fails_the_add_and_the_pod_is_closed(here: Node, fault: Fault) -> None:
    bad = fake(here, faulty(fault, "victim"))
    other = here.add(here.pod("bystander"))
    rules = other.rules()
    pod = here.pod("victim")
    try:
        outcome = here.cni("ADD", pod)
        assert (outcome.error, outcome.seconds < BOUND) == (11, True), outcome.answer
        assert "ztunnel" in outcome.words
        assert here.state(pod) == "pending"
        assert "sluice:" in pod.ruleset()
        assert here.refused(pod)
        assert other.rules() == rules
    finally:
        bad.close()
    good = fake(here)
    here.add(pod)
    until(lambda: {here.state(pod), here.state(other)} == {"enabled"}, "both pods are taken by the good one")
    assert {pod.uid, other.uid} <= set(good.added())
    assert other.rules() == rules
    for one in (pod, other):
        here.delete(one)
        assert not here.known(one)
    good.close()
    here.await_ztunnel(0)


def test_beside_a_good_one_nobody_else_notices(here: Node) -> None:
    here.processes.start_ztunnel()
    here.await_ztunnel()
    other = here.add(here.pod("bystander"))
    for fault in (never, dies, garbage):
        # Newest, so new pods go to it. It listens nowhere: where it does, connections wait in its queue for ever.
        bad = fake(here, faulty(fault, "victim"), ports=())
        pod = here.pod("victim")
        outcome = here.cni("ADD", pod)
        assert outcome.error in (0, 11), outcome.answer
        assert outcome.seconds < BOUND
        assert here.captured(other)
        bad.close()
        here.add(pod)
        assert here.captured(pod)
        assert here.captured(other)
        here.delete(pod)
    here.processes.end("ztunnel")
    assert here.refused(other)  # fails closed: nobody takes it, and it does not get past
    here.delete(other)


@pytest.mark.parametrize("hello", [encode(Hello(7)), b"\xff" * 10, b"x" * 3000])
def test_hello_that_is_none_is_dropped(here: Node, hello: bytes) -> None:
    bad = FakeZtunnel(here.run_dir / "ztunnel.sock", hello=hello)
    assert bad.ended.wait(20)
    assert bad.requests == []
    assert here.ask("/v1/status")["ztunnel_connections"] == 0


def test_answer_without_a_question_is_dropped(here: Node) -> None:
    bad = fake(here)
    bad.socket.send(encode(Ack()))
    assert bad.ended.wait(20)
    good = fake(here)
    pod = here.add(here.pod("after"))
    assert here.state(pod) == "enabled"
    here.delete(pod)
    good.close()


def test_ztunnel_that_comes_back_is_given_every_pod(here: Node) -> None:
    first = fake(here)
    pods = [here.add(here.pod(f"many{number}")) for number in range(5)]
    first.close()
    until(lambda: {here.state(pod) for pod in pods} == {"pending"}, "all wait for a ztunnel")
    second = fake(here)
    assert set(second.added()) == {pod.uid for pod in pods}
    until(lambda: {here.state(pod) for pod in pods} == {"enabled"}, "all are enabled again")
    for pod in pods:
        here.delete(pod)
    second.close()


def test_silent_ztunnel_does_not_hold_up_what_is_not_enrolled(here: Node) -> None:
    bad = FakeZtunnel(here.run_dir / "ztunnel.sock", never)
    pod: NodePod = here.pod("plain", enrolled=False)
    outcome = here.cni("ADD", pod)
    assert (outcome.error, outcome.seconds < BOUND) == (0, True)
    assert pod.ruleset() == ""
    here.delete(pod)
    bad.close()
