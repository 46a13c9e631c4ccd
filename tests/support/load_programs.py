# SPDX-License-Identifier: Apache-2.0
"""The load of tests.support.load, as one process of its own with a child per server, client and transfer.

Started with the paths of the pod's and of the outside's namespace and the descriptor of the shared counts; ends at the
end of its stdin. Standard library only, so that it starts quickly. All sockets are there before the first client is.

"Z" is said by what listens on ztunnel's ports, "S" by everybody else: a client that hears "S" has escaped capture.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import random
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator

OUTBOUND, INBOUND, MARK = 15001, 15006, 0x539
OUTSIDE_PORT, POD_PORT = 7000, 8080
POD, OUTSIDE = ("10.78.0.2", "fd78::2"), ("10.78.0.1", "fd78::1")  # of support.pair
BLOCK = 1 << 16
COUNTS = struct.Struct("=4Q")  # captured, escaped, failed, bytes; one for each client and transfer
CLIENTS, TRANSFERS = 2, 2
SECONDS = 0.95  # a lost SYN is sent again after 1 s: that is a failure, not a delay
_TIMEOUT = struct.pack("@ll", 0, int(SECONDS * 1e6))
_PATIENCE = struct.pack("@ll", 0, 200_000)  # of a server, which serves nobody else meanwhile
_FOR_EVER = struct.pack("@ll", 0, 0)
_RESET = struct.pack("@ii", 1, 0)

Address = tuple[str, int]


class Ended(Exception):
    """By SIGTERM."""


def enter(path: str) -> None:
    with open(path, "rb") as file:  # noqa: PTH123
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"setns {path}")


def listen(port: int, mark: int = 0) -> socket.socket:
    made = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    made.bind(("::", port))
    made.listen(4096)
    return made


def serve(listener: socket.socket, word: bytes) -> None:
    """Says its word and ends; or, where the client wants a transfer, sends everything back, in a child."""
    children = []
    try:
        while True:
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)
                wish = client.recv(1)
                client.send(word)
                if wish == b"t":
                    children.append(child(lambda end=client: send_back(end)))  # type: ignore[misc]
    finally:
        finish(children)  # also those whose client was lost without a word


def send_back(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _FOR_EVER)
    while data := client.recv(BLOCK):
        client.sendall(data)


def connect(address: Address) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        made.setsockopt(socket.SOL_SOCKET, option, _TIMEOUT)
    made.connect(address)
    return made


def knock(targets: tuple[Address, ...], counts: memoryview) -> None:
    """One connection after the other, with a breath for the rest of the machine after a few.

    The kernel's readers (RCU) end late on processors that are never idle, and each change of nf_tables waits for them.
    """
    captured = escaped = failed = 0
    for target in itertools.cycle(targets):
        try:
            with connect(target) as made:
                made.send(b"c")
                word = made.recv(1)
                # Ended by a reset, so that no port is kept waiting.
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        except OSError as error:
            word = b""
            print(f"connection {captured + escaped + failed} to {target}: {error}", flush=True)
        captured, escaped, failed = captured + (word == b"Z"), escaped + (word == b"S"), failed + (word == b"")
        COUNTS.pack_into(counts, 0, captured, escaped, failed, 0)
        if (captured + escaped + failed) % 4 == 0:
            time.sleep(0.0005)


def transfer(target: Address, counts: memoryview) -> None:
    """One connection, on which blocks go out and have to come back as they were, until SIGTERM."""
    source = random.Random(1).randbytes(1 << 20)
    sent, word = 0, b""
    try:
        with connect(target) as made:
            made.send(b"t")
            word = made.recv(1)
            with contextlib.suppress(Ended):
                for block in blocks(source):
                    made.sendall(block)
                    if made.recv(BLOCK, socket.MSG_WAITALL) != block:
                        raise ConnectionError("the bytes that came back are others")
                    sent += BLOCK
                    COUNTS.pack_into(counts, 0, word == b"Z", word == b"S", 0, sent)
    except OSError as error:
        COUNTS.pack_into(counts, 0, word == b"Z", word == b"S", 1, sent)
        print(f"transfer to {target}, after {sent} bytes: {error}", flush=True)


def blocks(source: bytes) -> Iterator[bytes]:
    """Neighbours differ, so that a lost or doubled one is noticed."""
    for number in itertools.count():
        start = number * 4099 % (len(source) - BLOCK)
        yield source[start : start + BLOCK]
        time.sleep(0.001)  # leaves the processors to those whose connections are counted


def end(*_: object) -> None:
    raise Ended


def child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except (Ended, OSError):
            pass
        finally:  # also with an error of ours: what the parent has begun is not the child's to end
            if sys.exc_info()[0]:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(0)
    return pid


def finish(children: list[int]) -> None:
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    for pid in children:
        os.waitpid(pid, 0)


def main() -> None:
    pod, outside, fd = sys.argv[1], sys.argv[2], int(sys.argv[3])
    counts = memoryview(mmap.mmap(fd, COUNTS.size * (CLIENTS + TRANSFERS)))
    parts = [counts[at : at + COUNTS.size] for at in range(0, len(counts), COUNTS.size)]
    signal.signal(signal.SIGTERM, end)
    enter(outside)
    servers = [(listen(OUTSIDE_PORT), b"S")]
    enter(pod)
    servers += [(listen(POD_PORT), b"S"), (listen(OUTBOUND, MARK), b"Z"), (listen(INBOUND, MARK), b"Z")]
    serving = [child(lambda one=one: serve(*one)) for one in servers]  # type: ignore[misc]
    out = tuple((address, OUTSIDE_PORT) for address in OUTSIDE)
    clients = [child(lambda: knock(out, parts[0])), child(lambda: transfer(out[0], parts[2]))]
    enter(outside)
    inward = tuple((address, POD_PORT) for address in POD)
    clients += [child(lambda: knock(inward, parts[1])), child(lambda: transfer(inward[1], parts[3]))]
    sys.stdin.read()
    finish(clients)
    finish(serving)


if __name__ == "__main__":
    main()
