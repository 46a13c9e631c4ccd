# SPDX-License-Identifier: Apache-2.0
"""What is left of libbpf's messages, and a machine without libbpf."""

from __future__ import annotations

import ctypes
import errno

import pytest

from agent.core.errors import KernelError
from agent.kernel.bpf import libbpf

LOG = """libbpf: prog 'on_connect4': -- BEGIN PROG LOAD LOG --
0: R1=ctx() R10=fp0
; __u32 key = 1;
0: (b7) r1 = 1
; return *value;
7: (79) r0 = *(u64 *)(r0 +0)
R0 invalid mem access 'map_value_or_null'
processed 7 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0
-- END PROG LOAD LOG --
"""


def test_of_a_verifiers_log_the_last_instruction_and_what_is_wrong_with_it() -> None:
    messages = [
        "libbpf: prog 'on_connect4': BPF program load failed: Permission denied\n",
        LOG,
        "libbpf: prog 'on_connect4': failed to load: -13\n",
        "libbpf: failed to load object 'small.o'\n",
    ]
    assert libbpf.verdict(messages) == (
        "return *value; 7: (79) r0 = *(u64 *)(r0 +0); R0 invalid mem access 'map_value_or_null';"
        " prog 'on_connect4': failed to load: -13"
    )


def test_bounded_and_never_nothing_where_something_was_said() -> None:
    assert len(libbpf.verdict(["reason " * 20 + "\n"] * 50)) <= 400
    assert libbpf.verdict(["x" * 1000]) == "x" * 400
    assert libbpf.verdict(["libbpf: failed to load object 'small.o'\n"]) == "failed to load object 'small.o'"
    assert libbpf.verdict([]) == ""


def test_without_libbpf_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, **_: object) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    libbpf._library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    try:
        with pytest.raises(KernelError, match=r"libbpf\.so\.1: .*apt-get install libbpf1") as caught:
            libbpf.ask("bpf_obj_get", b"/nowhere")
    finally:
        libbpf._library.cache_clear()
    assert caught.value.errno == errno.ENOENT
