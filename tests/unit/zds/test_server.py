# SPDX-License-Identifier: Apache-2.0
"""The agent's end of ZDS with ztunnels that behave in every way; real sockets, one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.zdsbench import SOON, Bench, Ztunnel, bench, offered

from agent.core.errors import KernelError, ZtunnelError
from agent.kernel.process import Process
from agent.zds import server
from agent.zds.messages import Add, Delete, Hello, Keep, SnapshotSent, encode


@bench()
async def test_the_snapshot_then_additions(made: Bench) -> None:
    await offered(made, "a", "b")
    assert made.server.unacknowledged == 2
    ztunnel = await made.ztunnel()
    assert await ztunnel.snapshot() == [Add("uid-a", "a", "shop", ""), Add("uid-b", "b", "shop", "")]
    assert made.changed == ["uid-a", "uid-b"]  # whoever waited for a pod is told
    assert (made.server.connections, made.server.unacknowledged) == (1, 0)
    adding = made.publish("c", account="robot")
    assert await ztunnel.take() == Add("uid-c", "c", "shop", "robot")
    await adding
    await made.publish("a")  # known: nothing is sent


@bench()
async def test_the_snapshot_ends_when_the_agent_has_acted_on_every_acknowledgement(made: Bench) -> None:
    """Then a ztunnel is ready, and a rollout ends the one before it."""
    await offered(made, "a", "b")
    made.acting = asyncio.Event()
    ztunnel = await made.ztunnel()
    for name in ("a", "b"):
        assert await ztunnel.take() == Add(f"uid-{name}", name, "shop", "")
    await made.until(lambda: made.changed == ["uid-a", "uid-b"])
    ending = asyncio.create_task(ztunnel.receive())
    await asyncio.sleep(SOON)
    assert not ending.done() and made.server.unacknowledged == 2
    made.acting.set()
    assert await ending == SnapshotSent() and made.server.unacknowledged == 0


@bench(SOON)
async def test_the_snapshot_ends_in_time_whatever_the_agent_has_to_do(made: Bench) -> None:
    await offered(made, "a")
    made.acting = asyncio.Event()
    assert await (await made.ztunnel()).snapshot() == [Add("uid-a", "a", "shop", "")]


@bench()
async def test_the_descriptor_is_the_pods_namespace(made: Bench) -> None:
    await offered(made, "a")
    ztunnel = await made.ztunnel()
    for name in ("a", "b"):
        got, inode = await ztunnel.receive_with_inode()
        assert got == Add(f"uid-{name}", name, "shop", "")
        assert inode == (made.folder / name).stat().st_ino
        ztunnel.ack()
        if name == "a":
            assert await ztunnel.take() == SnapshotSent()
            adding = made.publish("b")
    await adding


@bench()
async def test_additions_go_to_the_newest_removals_to_all(made: Bench) -> None:
    first = await made.synced()
    adding = made.publish("a")
    assert isinstance(await first.take(), Add)
    await adding
    second = await made.synced()
    adding = made.publish("b")
    assert await second.take() == Add("uid-b", "b", "shop", "")
    await adding
    removing = asyncio.create_task(made.server.withdraw("uid-a"))
    assert await first.take() == Delete("uid-a")  # and not b before it
    assert await second.take() == Delete("uid-a")
    await removing
    second.socket.close()
    await made.until(lambda: made.server.connections == 1)
    adding = made.publish("b")  # the older one is the newest again
    assert await first.take() == Add("uid-b", "b", "shop", "")
    await adding


@bench()
async def test_pods_of_a_predecessor_are_kept_until_they_were_looked_at(made: Bench) -> None:
    made.server.expect("uid-a")
    made.server.expect("uid-b")
    await made.server.withdraw("uid-b")
    ztunnel = await made.ztunnel()
    assert await ztunnel.snapshot() == [Keep("uid-a")]
    removing = asyncio.create_task(made.server.withdraw("uid-a"))
    assert await ztunnel.take() == Delete("uid-a")
    await removing


@bench()
async def test_a_refusal_has_ztunnels_words_and_keeps_the_connection(made: Bench) -> None:
    ztunnel = await made.synced()
    adding = made.publish("a")
    await ztunnel.receive()
    ztunnel.ack("no such namespace")
    with pytest.raises(ZtunnelError, match="refused: no such namespace"):
        await adding
    assert made.server.unacknowledged == 1
    again = made.publish("a")
    assert isinstance(await ztunnel.take(), Add)
    await again


@bench()
async def test_a_refusal_in_the_snapshot_stops_no_other_pod(made: Bench) -> None:
    await offered(made, "a", "b")
    ztunnel = await made.ztunnel()
    await ztunnel.receive()
    ztunnel.ack("not this one")
    assert await ztunnel.snapshot() == [Add("uid-b", "b", "shop", "")]
    assert made.server.unacknowledged == 1
    assert made.changed == ["uid-b"]  # the refused one is not told as acknowledged


@bench(SOON)
async def test_one_that_never_acknowledges_is_dropped_and_another_takes_over(made: Bench) -> None:
    good = await made.synced()
    bad = await made.synced()
    adding = made.publish("a")
    await bad.receive()
    with pytest.raises(ZtunnelError, match="did not acknowledge within"):
        await adding
    await bad.end()
    await made.until(lambda: made.server.connections == 1)
    adding = made.publish("b")
    assert await good.take() == Add("uid-b", "b", "shop", "")
    await adding


@bench(SOON)
async def test_a_late_acknowledgement_is_not_taken_for_the_next_messages(made: Bench) -> None:
    ztunnel = await made.synced()
    first, second = made.publish("a"), made.publish("b")
    await ztunnel.receive()
    with pytest.raises(ZtunnelError, match="did not acknowledge"):
        await first
    with contextlib.suppress(OSError):  # it may see already that it was dropped
        ztunnel.ack()
    with pytest.raises(ZtunnelError):
        await second
    assert made.server.unacknowledged == 2
    await ztunnel.end()


@bench()
async def test_death_in_the_middle_of_the_snapshot_is_noticed_at_once(made: Bench) -> None:
    await offered(made, "a", "b", "c")
    dying = await made.ztunnel()
    await dying.take()
    await dying.receive()
    dying.socket.close()
    await made.until(lambda: made.server.connections == 0)  # and not only after the time to acknowledge
    assert made.server.unacknowledged == 3
    assert len(await (await made.ztunnel()).snapshot()) == 3  # the next one is given everything


@bench()
async def test_death_while_a_pod_is_added_fails_that_pod_at_once(made: Bench) -> None:
    ztunnel = await made.synced()
    adding = made.publish("a")
    await ztunnel.receive()
    ztunnel.socket.close()
    with pytest.raises(ZtunnelError, match="disconnected"):
        await adding


@pytest.mark.parametrize(
    "hello", [b"\xff\xff", encode(Hello(0)), encode(Hello(2)), b"\x0a\x01x", b"x" * 2000], ids=repr
)
def test_a_bad_greeting_is_dropped_and_the_server_lives(tmp_path: Path, hello: bytes) -> None:
    @bench()
    async def steps(made: Bench) -> None:
        bad = await Ztunnel(tmp_path / "zds.sock").dial(hello)
        await bad.end()
        assert made.server.connections == 0
        await made.synced()

    steps(tmp_path)


@bench(SOON)
async def test_silence_instead_of_a_greeting_is_dropped(made: Bench) -> None:
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    silent.setblocking(False)
    silent.connect(str(made.folder / "zds.sock"))
    assert await asyncio.get_running_loop().sock_recv(silent, 10) == b""
    silent.close()


@bench()
async def test_a_garbled_acknowledgement_is_an_error_and_dropped(made: Bench) -> None:
    ztunnel = await made.synced()
    adding = made.publish("a")
    await ztunnel.receive()
    ztunnel.socket.send(b"\xff\xff\xff")
    with pytest.raises(ZtunnelError, match="ZDS"):
        await adding
    await ztunnel.end()
    await made.synced()


@bench()
async def test_which_ztunnels_took_connections_since_when(made: Bench) -> None:
    before = made.server.unchanged_since
    assert before <= time.time() and made.server.processes == []
    ztunnel = await made.synced()
    assert made.server.processes == [os.getpid()]
    assert made.server.unchanged_since == before  # one more has come, none has left
    ztunnel.socket.close()
    await made.until(lambda: made.server.processes == [])
    assert before < made.server.unchanged_since <= time.time()


@bench()
async def test_an_answer_that_nobody_asked_for_is_dropped(made: Bench) -> None:
    ztunnel = await made.synced()
    ztunnel.ack()
    await ztunnel.end()
    await made.until(lambda: made.server.connections == 0)


@bench()
async def test_withdrawn_before_its_turn_in_the_snapshot(made: Bench) -> None:
    await offered(made, "a", "b")
    ztunnel = await made.ztunnel()
    await ztunnel.receive()
    await made.server.withdraw("uid-b")
    ztunnel.ack()
    assert await ztunnel.take() == SnapshotSent()


@bench()
async def test_withdrawn_while_its_addition_is_under_way(made: Bench) -> None:
    """The ztunnel must be told, although it has not acknowledged the pod yet."""
    await offered(made, "a")
    ztunnel = await made.ztunnel()
    await ztunnel.receive()
    removing = asyncio.create_task(made.server.withdraw("uid-a"))
    await asyncio.sleep(0)
    ztunnel.ack()
    assert {type(await ztunnel.take()) for _ in range(2)} == {Delete, SnapshotSent}
    await removing


@bench()
async def test_a_pod_that_does_not_fit_a_message_costs_no_connection(made: Bench) -> None:
    ztunnel = await made.synced()
    for account in ("x" * 2000, "\ud800"):
        with pytest.raises(ZtunnelError, match="cannot encode message"):
            await made.publish("big", account=account)
    adding = made.publish("a")
    assert await ztunnel.take() == Add("uid-a", "a", "shop", "")
    await adding
    other = await made.ztunnel()
    assert await other.snapshot() == [Add("uid-a", "a", "shop", "")]


@bench()
async def test_only_root_may_use_the_socket(made: Bench) -> None:
    assert stat.S_IMODE((made.folder / "zds.sock").stat().st_mode) == 0o600


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(str(tmp_path / "zds.sock"))

    @bench()
    async def steps(made: Bench) -> None:
        await made.synced()

    steps(tmp_path)


def test_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "peer", lambda sock: (1, os.geteuid() + 12345))

    @bench()
    async def steps(made: Bench) -> None:
        await offered(made, "a")
        await (await made.ztunnel()).end()
        assert made.server.connections == 0

    steps(tmp_path)


def met(made: Bench, arrived: Callable[[Process], None]) -> None:
    """From now on the bench takes the processes of ztunnels so."""
    made.arrived = arrived  # type: ignore[method-assign]


@bench()
async def test_a_ztunnels_process_is_known_before_it_is_told_of_pods(made: Bench) -> None:
    await offered(made, "a")
    known: list[tuple[Process, int]] = []
    met(made, lambda process: known.append((process, made.server.unacknowledged)))
    ztunnel = await made.synced()
    ((process, unacknowledged),) = known
    assert (process.pid, process.alive(), unacknowledged) == (os.getpid(), True, 1)
    ztunnel.socket.close()
    await made.until(lambda: made.server.connections == 0)
    assert process.alive()  # it is let go of by whoever has it, not with its connection
    process.close()


@bench()
async def test_no_process_of_one_that_was_not_admitted(made: Bench) -> None:
    known: list[Process] = []
    met(made, known.append)
    await (await Ztunnel(made.folder / "zds.sock").dial(b"\xff\xff")).end()
    assert known == []


@bench()
async def test_a_process_that_is_not_to_be_had_costs_no_pod_its_ztunnel(
    made: Bench,
) -> None:
    def refuse(sock: socket.socket) -> Process:
        raise KernelError("hold it", 1, "no")

    met(made, lambda process: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.Process, "of_peer", refuse)
        await made.synced()
    assert made.server.connections == 1


@bench()
async def test_descriptors_of_processes_are_not_left_behind(made: Bench) -> None:
    def fail(process: Process) -> None:
        raise RuntimeError("a defect")

    async def visit() -> int:
        ztunnel = await made.ztunnel()
        while await ztunnel.receive() is not None:  # to its end, when the server drops it
            ztunnel.ack()
            ztunnel.socket.shutdown(socket.SHUT_WR)
        ztunnel.socket.close()
        await made.until(lambda: made.server.connections == 0)
        return sum("pidfd" in place for place in open_files())

    before = sum("pidfd" in place for place in open_files())
    met(made, fail)
    assert await visit() == before
    met(made, Process.close)
    assert await visit() == before


def open_files() -> list[str]:
    found = []
    for place in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(place.readlink()))
    return found
