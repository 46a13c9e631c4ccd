# SPDX-License-Identifier: Apache-2.0
"""The sanitized build of `sluice-cni`, a process per example, fed with what runtimes and agents should not say."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.sources.cni.wire import CniReply, frame

REPO = Path(__file__).resolve().parents[2]


@dataclass
class Peer:
    """Answers every connection with `answer`, read or not, and closes it."""

    path: str
    answer: bytes = b""
    seen: list[bytes] = field(default_factory=list)

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError):
                self.seen.append(sock.recv(1 << 20))
                sock.sendall(self.answer)


@pytest.fixture(scope="module")
def plugin() -> Path:
    subprocess.run(["make", "-s", "-C", str(REPO / "cni_plugin"), "sanitized"], check=True)
    return REPO / "cni_plugin" / "build" / "sluice-cni-sanitized"


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    path = str(tmp_path_factory.mktemp("run") / "cni.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        peer = Peer(path)
        thread = threading.Thread(target=peer.serve, args=(listener,))
        thread.start()
        try:
            yield peer
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
RESULT = st.dictionaries(st.sampled_from(["ips", "cniVersion", "x"]) | st.text(max_size=5), ANY, max_size=3)
# The socket is always given, and never the default one: there may be a real agent on this machine.
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "socket": st.sampled_from(["", "/", "x", "/nonexistent/x", "/" + "x" * 200, "/a\0b"]) | ANY,
        "cniVersion": st.sampled_from(["0.3.1", "0.4.0", "1.0.0", "2.0.0"]) | ANY,
        "name": st.text(max_size=5) | ANY,
        "prevResult": RESULT | ANY,
        "runtimeConfig": st.dictionaries(st.just("io.kubernetes.cri.pod-annotations"), ANY) | ANY,
        "excludeNamespaces": st.lists(st.sampled_from(["shop", "a"]) | ANY, max_size=3) | ANY,
        "exemptPods": st.lists(st.sampled_from(["shop/web", "shop/w*", "shop/*", "a/b"]) | ANY, max_size=3) | ANY,
        "timeoutSeconds": st.integers(0, 130) | ANY,
        "unknown": ANY,
    },
)
PAIR = st.sampled_from(
    ["K8S_POD_NAMESPACE=shop", "K8S_POD_NAMESPACE=", "K8S_POD_NAME=web", "=", "K8S_POD_NAMESPACE", ""]
)
# What execve can carry: any bytes but NUL.
WORD = st.binary(max_size=80).map(lambda word: word.replace(b"\0", b""))
ENVIRONMENT = st.fixed_dictionaries(
    {
        "CNI_CONTAINERID": st.just(b"c0ffee") | WORD | st.just(b"x" * 300),
        "CNI_NETNS": st.sampled_from([b"/proc/self/ns/net", b"", b"/nonexistent", b"/proc/self/root"]) | WORD,
        "CNI_IFNAME": st.just(b"eth0") | WORD,
        "CNI_ARGS": st.lists(PAIR | st.text(st.characters(min_codepoint=1), max_size=20), max_size=5).map(
            lambda pairs: ";".join(pairs).encode(errors="ignore")
        )
        | WORD,
    }
)
VERB = st.sampled_from(["ADD", "ADD", "DEL", "CHECK", "STATUS", "GC", "VERSION"])
ANSWER = (
    st.builds(CniReply, st.integers(0, 2**31 - 1), st.text(), st.text()).map(CniReply.encode)
    | st.dictionaries(st.sampled_from(["code", "msg", "details"]), ANY).map(lambda a: frame(json.dumps(a).encode()))
    | st.tuples(st.binary(min_size=4, max_size=4), st.binary(max_size=100)).map(b"".join)
    | st.binary(max_size=100).map(frame)
    | st.binary(max_size=10)
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def good(peer: Peer) -> dict[str, Any]:
    return {
        "socket": peer.path,
        "cniVersion": "1.1.0",
        "name": "lab",
        "type": "sluice-cni",
        "excludeNamespaces": ["kube-system"],
        "exemptPods": ["istio-system/ztunnel-*"],
        "timeoutSeconds": 20,
        "prevResult": {"cniVersion": "1.1.0", "ips": [{"address": "10.0.0.1/24"}]},
        "runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"a": "b"}},
    }


def run(plugin: Path, verb: str, stdin: bytes, environment: dict[str, bytes]) -> tuple[int, bytes]:
    """The invariant: exit code 0 or 1, one JSON object or nothing on stdout, nothing said by a sanitizer."""
    options = {"ASAN_OPTIONS": "exitcode=99:detect_leaks=1", "UBSAN_OPTIONS": "exitcode=99"}
    done = subprocess.run(
        [plugin],
        input=stdin,
        env={**environment, "CNI_COMMAND": verb, **options},
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert done.stderr == b"", done.stderr.decode(errors="replace")
    assert done.returncode in (0, 1)
    assert not done.stdout or isinstance(json.loads(done.stdout), dict)
    if done.returncode == 1:
        error = json.loads(done.stdout)
        assert isinstance(error["code"], int)
        assert isinstance(error["msg"], str)
    if verb == "DEL":
        assert (done.returncode, done.stdout) == (0, b"")
    return done.returncode, done.stdout


GOOD_ENVIRONMENT = {
    "CNI_CONTAINERID": b"c0ffee",
    "CNI_NETNS": b"/proc/self/ns/net",
    "CNI_IFNAME": b"eth0",
    "CNI_ARGS": b"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web",
}


@FUZZ
@given(VERB, CHANGES)
def test_p28_configurations(plugin: Path, peer: Peer, verb: str, changes: dict[str, Any]) -> None:
    """Exit code 0 or 1, stdout empty or one JSON object, no sanitizer report; ADD prints prevResult as it was."""
    peer.answer = CniReply().encode()
    config = {**good(peer), **changes}
    code, stdout = run(plugin, verb, json.dumps(config).encode(), GOOD_ENVIRONMENT)
    if verb == "ADD" and code == 0:
        assert json.loads(stdout) == {**config["prevResult"], "cniVersion": config["cniVersion"]}


@FUZZ
@given(VERB, st.data())
def test_damaged_configurations(plugin: Path, peer: Peer, verb: str, data: st.DataObject) -> None:
    """Exit code 0 or 1, stdout empty or one JSON object, no sanitizer report."""
    peer.answer = CniReply().encode()
    text = json.dumps(good(peer)).encode()
    start = text.index(b'"cniVersion"')  # what comes before holds the socket
    at = data.draw(st.integers(start, len(text)))
    cut = data.draw(st.integers(0, 8))
    run(plugin, verb, text[:at] + data.draw(st.binary(max_size=8)) + text[at + cut :], GOOD_ENVIRONMENT)


@FUZZ
@given(VERB, ENVIRONMENT)
def test_environments(plugin: Path, peer: Peer, verb: str, environment: dict[str, bytes]) -> None:
    """Exit code 0 or 1, stdout empty or one JSON object, no sanitizer report."""
    peer.answer = CniReply().encode()
    run(plugin, verb, json.dumps(good(peer)).encode(), environment)


@FUZZ
@given(VERB, ANSWER)
def test_answers(plugin: Path, peer: Peer, verb: str, answer: bytes) -> None:
    """Exit code 0 or 1, stdout empty or one JSON object, no sanitizer report; the agent was really asked."""
    peer.answer = answer
    peer.seen.clear()
    code, _ = run(plugin, verb, json.dumps(good(peer)).encode(), GOOD_ENVIRONMENT)
    assert len(peer.seen) == (verb != "VERSION")
    if verb == "ADD" and code == 0:
        assert json.loads(answer[4:])["code"] == 0
