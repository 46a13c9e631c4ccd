# SPDX-License-Identifier: Apache-2.0
"""Programs of others in a pod's packet path are named by where they are attached; ours are not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.bpfnode import bpf_node, opened
from support.ebpf import EbpfNode
from support.pair import pair

from agent.core.model.redirect import Redirect
from agent.kernel.bpf import bpffs, link
from agent.kernel.bpf.syscall import AttachType
from agent.kernel.exec import run, start
from agent.reconciler.converge import settle
from agent.sources.pathprograms import others

pytestmark = pytest.mark.root


def test_each_is_named_by_its_place(tmp_path: Path) -> None:
    with pair() as nodes, bpf_node(tmp_path) as foreign, contextlib.ExitStack() as made:
        node = EbpfNode()
        made.callback(node.close)
        settle(nodes.target, Redirect(marks=False), node.layers)
        made.callback(settle, nodes.target, None, node.layers)
        cgroup = bpffs.cgroup_root() / f"slu-pp-{os.getpid()}"
        cgroup.mkdir()
        made.callback(cgroup.rmdir)
        process = start(["sleep", "600"], netns=nodes.pod.path)
        made.callback(process.wait)
        made.callback(process.kill)
        (cgroup / "cgroup.procs").write_text(str(process.pid))
        assert others(nodes.target) == (), "ours"
        foreign.load()

        def attach(name: str, how: Callable[[int], int]) -> None:
            with opened(foreign.program(name)) as program:
                made.callback(os.close, nodes.target.netns.call(lambda: how(program)))

        index = nodes.target.wiring().links[0].index
        held = os.open(cgroup, os.O_RDONLY)
        made.callback(os.close, held)
        attach("on_packet", lambda one: link.attach_tcx(one, index, AttachType.TCX_INGRESS))
        attach("on_lookup", lambda one: link.attach_netns(one, nodes.target.netns.fd, AttachType.SK_LOOKUP))
        attach("on_connect4", lambda one: link.attach_cgroup(one, held, AttachType.CGROUP_INET4_CONNECT))
        run(["tc", "qdisc", "add", "dev", "eth0", "clsact"], netns=nodes.pod.path)
        lookup, packet, filters, connect = others(nodes.target)
        assert lookup.startswith("BPF program on_lookup (number ") and lookup.endswith("(sk_lookup)")
        assert packet.startswith("BPF program on_packet ") and packet.endswith("attached to eth0 (tcx_ingress)")
        assert filters.startswith("tc filters may be attached to eth0")
        assert connect.endswith(f"attached to the cgroup /{cgroup.name} (cgroup_inet4_connect)")
