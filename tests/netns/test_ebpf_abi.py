# SPDX-License-Identifier: Apache-2.0
"""The object files pass the verifier, and bpf/abi.h says in C what the agent says in Python: compared by BTF."""

from __future__ import annotations

import struct
from dataclasses import fields
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from support.abi import BPF, Types, mutations, types_in, types_of
from support.bpfnode import bpf_node

from agent.backends.ebpf import abi, object_files
from agent.backends.ebpf.abi import ExitCause, InterfaceRole, PodFlag, PodValue, PolicyKind, Prefix
from agent.backends.ebpf.ztunnels import Role
from agent.core import names
from agent.core.errors import CommandError
from agent.kernel.bpf import asked_resolvers, load
from agent.kernel.bpf.map import Map

pytestmark = pytest.mark.root
HEADER = BPF / "abi.h"
FOUR, SIX = (ip_address(text) for text in ("10.1.2.3", "fd00::1:2:3"))
BYTES = bytes(range(1, 17))


# --- what is compared


def check(types: Types) -> None:
    """Raises AssertionError where C and Python differ."""
    for part in (check_pods, check_policies, check_keys, check_queries, check_enums, check_fixed):
        part(types)


def check_pods(types: Types) -> None:
    addresses = {name: ip_address(f"fd00::{n}") for n, name in enumerate(("own6", "link6", "probe6"), 1)}
    addresses |= {name: ip_address(f"10.0.0.{n}") for n, name in enumerate(("own4", "probe4"), 1)}
    pod = PodValue(flags=PodFlag.IPV6 | PodFlag.LOOPBACK4, has=0x123, policy=0x1122334455667788, **addresses)
    packed = {name: abi.address(value) for name, value in addresses.items()}
    made = types.pack("pod", flags=int(pod.flags), has=0x123, policy=pod.policy, **packed)
    assert (pod.encode(), PodValue.decode(made)) == (made, pod)
    assert [one.name for one in fields(PodValue)] == [*types.structs["pod"][1]]
    assert types.structs["address"] == (abi.ADDRESS, {"word": (0, abi.ADDRESS)})
    assert abi.address(FOUR) == bytes(10) + b"\xff\xff\x0a\x01\x02\x03" and abi.address(SIX) == SIX.packed


def check_policies(types: Types) -> None:
    one = Prefix(PolicyKind.USER, BYTES, 17, 3)
    exact = types.structs["policy_key"][1]["value"][0] * 8 - 32  # bits between the length and the value
    key = types.pack("policy_key", prefix=exact + 17, kind=int(one.kind), policy=0x1122334455667788, value=BYTES)
    value = types.pack("policy_value", verdict=3, prefix=exact + 17)
    assert (one.key(0x1122334455667788), one.encode()) == (key, value)
    assert abi.prefix(key, value) == (0x1122334455667788, one)
    assert types.structs["policy_key"][1]["prefix"] == (0, 4), "as the kernel's longest prefix match has it"


def check_keys(types: Types) -> None:
    assert abi.ztunnel(0x1122334455667788, 7) == types.pack("ztunnel", cgroup=0x1122334455667788, tgid=7)
    assert abi.unztunnel(types.pack("ztunnel", cgroup=9, tgid=7)) == (9, 7)
    assert abi.listener(9, 1, 2) == types.pack("listener", cookie=9, role=1, slot=2)
    assert abi.non_tcp_key(9, 1) == types.pack("non_tcp_key", cookie=9, direction=1)
    assert abi.traffic(types.pack("traffic", packets=5, bytes=6)) == (5, 6)
    assert abi.cookie(0x1122334455667788) == (0x1122334455667788).to_bytes(8, "little")


def check_queries(types: Types) -> None:
    """As the embedded ztunnel reads them; ports are in network order."""
    assert asked_resolvers.encode(9, 0x1234) == types.pack("query", cookie=9, port=b"\x12\x34", protocol=17, source=0)
    given = types.pack("query", cookie=9, port=b"\x12\x34", protocol=17, source=b"\x7f\1\2\3")
    assert asked_resolvers.encode(9, 0x1234, "127.1.2.3") == given
    told = types.pack("resolver", address=abi.address(FOUR), port=b"\x00\x35")
    assert asked_resolvers.decode(told) == (str(FOUR), 53)


def check_enums(types: Types) -> None:
    for name, start, found, end in (
        ("pod_flags", "POD_", PodFlag, ()),
        ("policy_kind", "POLICY_", PolicyKind, ("KINDS",)),
        ("interface_role", "ROLE_", InterfaceRole, ()),
        ("exit_cause", "EXIT_", ExitCause, ("CAUSES",)),
        ("listener_role", "LISTEN_", Role, ()),
    ):
        written = {word.removeprefix(start): value for word, value in types.enums[name].items()}
        for each in end:
            assert written.pop(each) == len(written), f"{name}: {each}"
        assert written == {one.name: one.value for one in found}, name
    assert types.enums["direction"] == {"OUTBOUND": 0, "INBOUND": 1}  # as of abi.non_tcp_key


def check_fixed(types: Types) -> None:
    fixed = types.enums["fixed"]
    slots = fixed.pop("LISTENER_SLOTS")
    assert fixed == {name: getattr(names, name) for name in fixed}
    assert {*fixed} == {"OUTBOUND_PORT", "INBOUND_PORT", "HBONE_PORT", "DNS_PORT"} | {
        "ZTUNNEL_MARK", "CONNECTION_MARK", "MARK_MASK"
    }  # fmt: skip
    assert slots == abi.LISTENER_SLOTS


# --- and how


@pytest.fixture(scope="module")
def types(tmp_path_factory: pytest.TempPathFactory) -> Types:
    return types_of(HEADER, tmp_path_factory.mktemp("abi"))


@pytest.mark.parametrize(
    "part", [check_pods, check_policies, check_keys, check_queries, check_enums, check_fixed], ids=lambda p: p.__name__
)
def test_c_and_python_say_the_same(types: Types, part: Any) -> None:
    part(types)


@pytest.mark.parametrize("name", sorted({one.object for one in (*object_files.NODE, *object_files.POD)}))
def test_what_the_programs_were_built_with_is_that_header(types: Types, name: str) -> None:
    """The object file has its own copy of every struct: the one that counts on the node."""
    found = types_in(object_files.path(name)).structs
    mine = found.keys() & types.structs.keys()
    assert "pod" in mine or name == "events"
    assert {each: found[each] for each in mine} == {each: types.structs[each] for each in mine}


def test_no_struct_has_padding_that_nobody_names(types: Types) -> None:
    for name, (whole, layout) in types.structs.items():
        assert sum(room for _, room in layout.values()) == whole, name


# Map -> struct of its key, and of its value; or their sizes.
MAPS: dict[str, tuple[str | int, str | int]] = {
    "pods": (8, "pod"),
    "policies": ("policy_key", "policy_value"),
    "exits": (4, 8),
    "ztunnels": ("ztunnel", 4),
    "listeners": ("listener", 8),
    "memories": (4, "memory"),
    "handover": ("connection", "memory"),
    "resolvers": ("query", "resolver"),
    "flows": ("flow", 4),
    "beside": ("non_tcp_key", "traffic"),
}


def test_every_object_passes_the_verifier_and_its_maps_have_those_sizes(tmp_path: Path, types: Types) -> None:
    with bpf_node(tmp_path) as node:
        everything = {one.object for one in (*object_files.NODE, *object_files.POD)}
        others = {one.object for one in object_files.ACCOUNTING}  # see test_account_abi
        built = {path.name.removesuffix(".bpf.o") for path in object_files.DIRECTORY.glob("*.bpf.o")}
        assert built == everything | others
        for name in sorted(everything):
            wanted = tuple(one.name for one in (*object_files.NODE, *object_files.POD) if one.object == name)
            constants = struct.pack("=Q", 7) if name in {one.object for one in object_files.POD} else b""
            loaded = load.load(object_files.path(name), node.maps, lambda each: node.program(each), {}, constants)
            assert sorted(loaded) == sorted(wanted)
        assert {path.name for path in node.maps.iterdir()} == {*MAPS}
        for name, pair in MAPS.items():
            key, value = (types.structs[one][0] if isinstance(one, str) else one for one in pair)
            with Map.open(node.maps / name) as found:
                assert (found.key_size, found.value_size) == (key, value), name
                if name == "exits":
                    assert found.max_entries == len(ExitCause)


# --- a change is noticed


# What the agent neither reads nor writes: only the programs do, among themselves.
INSIDE = ("enum memory_kind", "struct memory", "struct connection", "struct flow")


@pytest.mark.slow
def test_every_change_of_the_header_is_noticed(tmp_path: Path) -> None:
    """But of what stays among the programs, and of padding, which a test above counts."""
    missed, tried = [], 0
    for what, header in mutations(HEADER, INSIDE):
        place = tmp_path / str(tried)
        place.mkdir()
        (place / "abi.h").write_text(header)
        tried += 1
        try:
            check(types_of(place / "abi.h", place))
        except (AssertionError, CommandError, AttributeError, KeyError, ValueError, struct.error):
            continue  # that it does not compile is noticed, too
        missed.append(what)
    assert missed == [] and tried > 140
