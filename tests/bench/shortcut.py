# SPDX-License-Identifier: Apache-2.0
"""Whether a socket whose peer is reached through sk_msg still behaves as a TCP socket: why there is no shortcut.

`python -m tests.bench.shortcut` (root) does the same to a loopback connection without and with a program that moves its
bytes from socket to socket, and prints what differs. On a kernel where nothing differs the shortcut can be thought of
again: docs/design/ebpf-sockmap.md says what it would bring.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/support, as pytest has it

from support import rules

from agent.core.text import table
from agent.kernel.bpf import bpffs
from agent.kernel.exec import run

SOURCE = Path(__file__).with_suffix("") / "shortcut.bpf.c"
WHERE = ("127.0.0.2", 15001)
BY_STACK = b"s" * 777  # as in the program
MOST = 64 << 20  # bytes that a sender may queue before the test stops it
FIONREAD, SO_ZEROCOPY, MSG_ZEROCOPY = (
    0x541B,
    60,
    0x4000000,
)  # asm-generic/ioctls.h, asm-generic/socket.h, linux/socket.h
BYTES_SENT = 200  # offset of tcpi_bytes_sent, linux/tcp.h
Check = Callable[[socket.socket, socket.socket], str]


def half_close(near: socket.socket, far: socket.socket) -> str:
    near.sendall(b"question")
    near.shutdown(socket.SHUT_WR)
    asked = far.recv(99) + far.recv(99)
    far.sendall(b"answer")
    far.close()
    return f"{asked!r} {near.recv(99)!r} {near.recv(99)!r}"


def reset(near: socket.socket, far: socket.socket) -> str:
    near.sendall(b"x")
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    near.close()
    return f"{far.recv(99)!r} {_result(lambda: far.recv(99))}"


def closed_unread(near: socket.socket, far: socket.socket) -> str:
    near.sendall(b"x")
    far.close()
    return _result(lambda: near.recv(99))


def order(near: socket.socket, far: socket.socket) -> str:
    """First by the stack, then from socket to socket: as at set-up, when the peer becomes known."""
    near.sendall(BY_STACK)
    near.sendall(b"later")
    return repr(far.recv(5))


def blocked(near: socket.socket, far: socket.socket) -> str:
    """A thread waits in recv() without a timeout while another one shuts down the sending side."""
    near.settimeout(None)
    found = list[str]()
    reader = threading.Thread(target=lambda: found.append(_result(lambda: near.recv(9))))
    reader.start()
    time.sleep(0.2)  # there is no event that tells that it waits in the kernel
    near.shutdown(socket.SHUT_WR)
    far.recv(9)
    reader.join(0.3)
    early = bool(found)
    with contextlib.suppress(OSError):
        far.sendall(b"answer")
    reader.join()
    return found[0] if early else "waits"


def waitall(near: socket.socket, far: socket.socket) -> str:
    near.sendall(b"abc")
    later = threading.Timer(0.2, near.sendall, [b"defgh"])
    later.start()
    far.settimeout(None)
    got = far.recv(8, socket.MSG_WAITALL)
    later.join()
    return repr(got)


def spliced(near: socket.socket, far: socket.socket) -> str:
    near.sendall(b"hello")
    far.setblocking(False)
    readable, writable = os.pipe()
    try:
        select.select([far], [], [], 2)
        return _result(lambda: os.splice(far.fileno(), writable, 99))
    finally:
        os.close(readable)
        os.close(writable)


def waiting(message: bytes) -> Check:
    def check(near: socket.socket, far: socket.socket) -> str:
        near.sendall(message)
        select.select([far], [], [], 2)
        return str(struct.unpack("i", fcntl.ioctl(far, FIONREAD, bytes(4)))[0])

    return check


def low_water(near: socket.socket, far: socket.socket) -> str:
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 100)
    near.sendall(b"abc")
    return "readable" if select.select([far], [], [], 0.1)[0] else "not yet"


def urgent(near: socket.socket, far: socket.socket) -> str:
    near.send(b"abX", socket.MSG_OOB)
    in_band = far.recv(9)
    far.setblocking(False)  # else Python waits for what is in band
    return f"{in_band!r} {_result(lambda: far.recv(1, socket.MSG_OOB))}"


def zero_copy(near: socket.socket, far: socket.socket) -> str:
    near.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
    near.send(bytes(20000), MSG_ZEROCOPY)
    while select.select([far], [], [], 0.2)[0]:
        far.recv(1 << 16)
    return _result(lambda: "notified" if near.recvmsg(9, 99, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT) else "")


def counted(near: socket.socket, far: socket.socket) -> str:
    """That the bytes take the other way at all: then tcp_info does not know of them."""
    near.sendall(bytes(100))
    far.recv(100)
    return str(struct.unpack_from("Q", near.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 208), BYTES_SENT)[0])


def not_read(near: socket.socket, far: socket.socket) -> str:
    near.setblocking(False)
    queued = 0
    with contextlib.suppress(BlockingIOError):
        while queued < MOST:
            queued += near.send(bytes(1 << 16))
    return "the sender stops" if queued < MOST else f"takes {MOST >> 20} MB"


COUNTED = "tcp_info counts"
CHECKS: dict[str, Check] = {
    "half-close, then the answer": half_close,
    "reset after data": reset,
    "closed with unread data": closed_unread,
    "order where the ways change": order,
    "blocking recv() while another thread shuts down": blocked,
    "recv(8, MSG_WAITALL), 3 bytes and then 5": waitall,
    "splice() from the socket": spliced,
    "FIONREAD": waiting(b"ten bytes!"),
    "FIONREAD, bytes that came by the stack": waiting(BY_STACK),
    "poll with SO_RCVLOWAT": low_water,
    "MSG_OOB": urgent,
    "MSG_ZEROCOPY": zero_copy,
    "the receiver does not read": not_read,
    COUNTED: counted,
}


def _result(call: Callable[[], object]) -> str:
    try:
        return repr(call())
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror or error}"


def found(pod: rules.Pod) -> dict[str, str]:
    answers = {}
    for name, check in CHECKS.items():
        with contextlib.ExitStack() as made:
            listener, near = (
                made.enter_context(pod.target.netns.call(lambda: socket.socket(socket.AF_INET))) for _ in range(2)
            )
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(WHERE)
            listener.listen()
            near.connect(WHERE)
            far = made.enter_context(listener.accept()[0])
            near.settimeout(2)
            far.settimeout(2)
            answers[name] = check(near, far)
    return answers


@contextlib.contextmanager
def shortcut() -> Iterator[None]:
    """For the connections that this process makes inside: it is in a cgroup of its own, with the programs."""
    cgroup = bpffs.cgroup_root() / f"slu-shortcut-{os.getpid()}"
    with contextlib.ExitStack() as made:
        directory = Path(made.enter_context(tempfile.TemporaryDirectory(prefix="slu-shortcut-")))
        pins, built = directory / "pins", directory / "shortcut.bpf.o"
        include = f"-I/usr/include/{os.uname().machine}-linux-gnu"
        run(["clang", "-O2", "-g", "-mcpu=v3", "-target", "bpf", include, "-c", str(SOURCE), "-o", str(built)])
        pins.mkdir()
        bpffs.mount(pins)
        made.callback(run, ["umount", str(pins)])
        run(["bpftool", "prog", "loadall", str(built), str(pins / "programs"), "pinmaps", str(pins / "maps")])
        peers, verdict = str(pins / "maps/peers"), str(pins / "programs/verdict")
        run(["bpftool", "prog", "attach", "pinned", verdict, "sk_msg_verdict", "pinned", peers])
        cgroup.mkdir()
        made.callback(cgroup.rmdir)
        run(["bpftool", "cgroup", "attach", str(cgroup), "sock_ops", "pinned", str(pins / "programs/established")])
        (cgroup / "cgroup.procs").write_text("0")
        made.callback((cgroup.parent / "cgroup.procs").write_text, "0")
        yield


def main() -> int:
    with rules.pod("slu-shortcut") as pod:
        plain = found(pod)
        with shortcut():
            moved = found(pod)
    if (plain.pop(COUNTED), moved.pop(COUNTED)) != ("100", "0"):
        raise RuntimeError("the bytes did not go from socket to socket: nothing is proven")
    rows = [(name, plain[name], moved[name], "" if plain[name] == moved[name] else "DIFFERS") for name in plain]
    print(f"Linux {os.uname().release}\n{table(('WHAT', 'TCP', 'SOCKET TO SOCKET', ''), rows)}")
    return int(plain != moved)


if __name__ == "__main__":
    sys.exit(main())
