# SPDX-License-Identifier: Apache-2.0
"""What a reading costs while very many connections live: `python -m tests.bench.live 100000` (root).

They are held by processes of their own, PER each, since one may not open that many files.
"""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/support, as pytest has it

from support.ebpf import EbpfNode
from support.ebpf_pod import PEER, Namespace, pair
from support.rules import layers

from agent.backends.ebpf.ztunnels import Ztunnels
from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.flows.ebpf.account_programs import Programs
from agent.flows.ebpf.collector import EbpfCollector
from agent.lab.lab import interruptible
from agent.reconciler.converge import settle

PER, FIRST, READINGS = 14000, 9000, 11
WANT = Redirect(exclude=Exclusions(outbound_ports=((FIRST, FIRST + 99),)))  # so they need no ztunnel


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with interruptible(), contextlib.ExitStack() as made:
        node = EbpfNode(ztunnel=False)
        made.callback(node.close)
        pod, peer = pair(made, "slu-live")
        pod.sh("sysctl -qw net.ipv4.ip_local_port_range='1024 65000'")
        programs = Programs(node.pins.accounting)
        made.callback(programs.remove)
        collector = EbpfCollector(programs, Ztunnels(), by_socket=False)
        collector.start()
        made.callback(collector.close)
        settle(pod.target, WANT, layers("nftables"))
        for _ in range(2):
            collector.enrol(pod.target, WANT, captured=True)
        made.enter_context(held(pod, peer, count))
        deltas, _ = collector.refresh()
        opened = sum(delta.opened for delta in deltas)
        times = []
        for _ in range(READINGS):
            began = time.perf_counter()
            collector.refresh()
            times.append(time.perf_counter() - began)
        found = f"{statistics.median(times) * 1e3:.0f} ms ({min(times) * 1e3:.0f} to {max(times) * 1e3:.0f})"
        print(f"{opened} connections live; a reading of all totals takes {found}")
    return 0


@contextlib.contextmanager
def held(pod: Namespace, peer: Namespace, count: int):  # type: ignore[no-untyped-def]
    """So many connections from pod to peer, until the end."""
    ready, tell = os.pipe()
    children = []
    for number, start in enumerate(range(0, count, PER)):
        some, listener = min(PER, count - start), peer.listen(FIRST + number)
        for accepts in (True, False):
            if not (child := os.fork()):
                kept = []
                for _ in range(some):
                    if accepts:
                        kept.append(listener.accept()[0])
                    else:
                        kept.append(pod.make())
                        kept[-1].connect((PEER[4], FIRST + number))
                os.write(tell, b"." if accepts else b"")
                time.sleep(3600)
            children.append(child)
        listener.close()
    try:
        for _ in range(len(children) // 2):
            os.read(ready, 1)
        yield
    finally:
        for child in children:
            os.kill(child, 9)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    sys.exit(main())
