# SPDX-License-Identifier: Apache-2.0
"""The agent killed at every step of an ADD: the runtime tries again, a later try succeeds, and nothing is left.

No switch in the product: it is stopped and killed by what can be seen of it from outside.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.cri import CriError
from support.crihost import RESOLVER
from support.crinode import CriNode, CriPod, Sandbox, running, until

from agent.zds.messages import Ack, Add, Message, Request

pytestmark = pytest.mark.root
# After the agent has gone on; of an ADD that takes it some 20 ms. In seconds.
MOMENTS = (0.003, 0.008)


@pytest.fixture(scope="module")
def made() -> Iterator[CriNode]:
    with running("slucrk") as made:
        made.start_web()
        yield made


@pytest.fixture
def here(made: CriNode) -> Iterator[CriNode]:
    yield made
    made.nothing_left()


class Try(threading.Thread):
    """RunPodSandbox under way; afterwards `sandbox`, or the runtime's `words`."""

    def __init__(self, here: CriNode, pod: CriPod) -> None:
        super().__init__(daemon=True)
        self.here, self.pod, self.words = here, pod, ""
        self.sandbox: Sandbox | None = None
        self.start()

    def run(self) -> None:
        try:
            self.sandbox = self.here.run(self.pod)
        except CriError as error:
            self.words = str(error)

    def ended(self) -> Try:
        self.join(40)
        assert not self.is_alive(), "no end of RunPodSandbox"
        return self


def plugin(here: CriNode) -> int:
    """The pid of the plugin that runs now; 0 while none does."""
    for pid in here.host.processes():
        try:
            if Path(f"/proc/{pid}/comm").read_text() == "sluice-cni\n":
                return pid
        except OSError:
            continue
    return 0


def waits(pid: int) -> bool:
    """Whether the plugin has its socket open and sleeps: it has connected, written, and waits for an answer."""
    try:
        links = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state == "S" and any(link.startswith("socket:") for link in links)


def refused(here: CriNode, tried: Try) -> None:
    """It failed with words that name plugin and pod, and nothing is there but what the agent noted before it died."""
    assert tried.sandbox is None
    for word in ("sluice-cni", tried.pod.key, "The runtime will retry"):
        assert word in tried.words, tried.words
    agents = ("note", "pin", "mount /run/sluice")
    until(lambda: not [what for what in here.left() if not what.startswith(agents)], "the runtime's is gone")


def comes_back(here: CriNode, pod: CriPod) -> None:
    """The agent starts again, and so does the pod."""
    here.start_agent()
    here.await_ztunnel()
    sandbox = here.run(pod.again())
    assert here.state(pod) == "enabled"
    assert here.captured(sandbox, here.client(sandbox), RESOLVER)
    here.remove(sandbox)


def test_p09_before_the_request_is_taken(here: CriNode) -> None:
    os.kill(here.pid(), signal.SIGSTOP)
    tried = Try(here, CriPod("early"))
    until(lambda: waits(plugin(here)), "the plugin waits for the agent")
    here.kill()
    refused(here, tried.ended())
    comes_back(here, tried.pod)


def held(here: CriNode, name: str, then: Callable[[], Message | None]) -> Try:
    """An ADD of which the ztunnel has just been told; `then` decides what it answers."""
    told = threading.Event()

    def answer(request: Request) -> Message | None:
        if isinstance(request, Add) and request.name == name:
            try:
                return then()
            finally:
                told.set()
        return Ack()

    here.fake_ztunnel(answer)  # the newest, so it is asked; it ends with the agent
    tried = Try(here, CriPod(name))
    assert told.wait(20)
    return tried


def test_p09_while_ztunnel_is_asked(here: CriNode) -> None:
    """Its rules are in, the acknowledgement has not come."""
    tried = held(here, "asked", lambda: None)
    here.kill()
    refused(here, tried.ended())
    comes_back(here, tried.pod)


def test_p09_between_acknowledgement_and_answer(here: CriNode) -> None:
    def stop() -> Message:
        os.kill(here.pid(), signal.SIGSTOP)
        return Ack()

    tried = held(here, "acked", stop)
    here.kill()
    refused(here, tried.ended())
    comes_back(here, tried.pod)


def test_p09_after_the_answer(here: CriNode) -> None:
    """The sandbox is made, and the pod's containers start while no agent is there: they are captured."""
    sandbox = here.run(CriPod("late"))
    here.kill()
    inside = here.client(sandbox)
    assert here.captured(sandbox, inside, RESOLVER)
    here.start_agent()
    here.await_ztunnel()
    assert here.captured(sandbox, inside, RESOLVER)
    here.remove(sandbox)


@pytest.mark.parametrize("seconds", MOMENTS)
def test_p09_at_some_moment(here: CriNode, seconds: float) -> None:
    """Stopped until the request is there, so that its work on it begins when it goes on."""
    os.kill(here.pid(), signal.SIGSTOP)
    tried = Try(here, CriPod("moment"))
    until(lambda: waits(plugin(here)), "the plugin waits for the agent")
    os.kill(here.pid(), signal.SIGCONT)
    time.sleep(seconds)  # the moment is the parameter: no event can be seen within
    here.kill()
    tried.ended()
    if tried.sandbox is None:
        refused(here, tried)
    else:
        assert here.captured(tried.sandbox, here.client(tried.sandbox), RESOLVER)
        here.remove(tried.sandbox)
    comes_back(here, tried.pod)
