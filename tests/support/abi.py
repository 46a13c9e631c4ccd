# SPDX-License-Identifier: Apache-2.0
"""What a header of bpf/ defines, as the compiler laid it out, read from BTF; and every small change of that header."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import bpftool

from agent.kernel.exec import run

BPF = Path(__file__).resolve().parents[2] / "bpf"
SYSTEM = f"-I/usr/include/{platform.machine()}-linux-gnu"  # which -target bpf does not look into
Layout = dict[str, tuple[int, int]]  # field -> offset and size


@dataclass(frozen=True)
class Types:
    """`structs`: name -> size and layout; `enums`: name -> its members."""

    structs: dict[str, tuple[int, Layout]]
    enums: dict[str, dict[str, int]]

    def pack(self, struct_name: str, **given: Any) -> bytes:
        """A value of that struct; every field is given, numbers in the machine's order, the rest is zero."""
        size, layout = self.structs[struct_name]
        assert {*given} | {"none"} >= {*layout} and {*layout} >= {*given}, f"fields of {struct_name}"
        made = bytearray(size)
        for name, value in given.items():
            at, room = layout[name]
            data = value if isinstance(value, bytes) else value.to_bytes(room, "little")
            assert len(data) == room, f"{struct_name}.{name} has {room} bytes"
            made[at : at + room] = data
        return bytes(made)


def types_of(header: Path, at: Path) -> Types:
    """Of everything that the header defines itself, used by a program or not."""
    words = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)
    defined = re.findall(r"^(struct|enum) (\w+) \{", words, re.MULTILINE)
    lines = [f'#include "{header}"', *(f"{kind} {name} {kind}_{name};" for kind, name in defined)]
    (at / "types.c").write_text("\n".join(lines) + "\n")
    built = at / "types.o"
    include = [SYSTEM, f"-I{BPF}"]
    run(["clang", "-O2", "-g", "-target", "bpf", *include, "-c", str(at / "types.c"), "-o", str(built)])
    found, names = types_in(built), {name for _, name in defined}
    assert names <= {*found.structs, *found.enums}
    return Types(*({name: one for name, one in each.items() if name in names} for each in (found.structs, found.enums)))


def types_in(built: Path) -> Types:
    """Of an object file."""
    listed = bpftool.shown("btf", "dump", "file", str(built))["types"]
    by_id = {each["id"]: each for each in listed}
    structs = {
        each["name"]: (
            each["size"],
            {m["name"]: (m["bits_offset"] // 8, _size(by_id, m["type_id"])) for m in each["members"]},
        )
        for each in listed
        if each["kind"] == "STRUCT"
    }
    enums = {
        each["name"]: {value["name"]: value["val"] for value in each["values"]}
        for each in listed
        if each["kind"] == "ENUM"
    }
    return Types(structs, enums)


def _size(by_id: dict[int, Any], number: int) -> int:
    found = by_id[number]
    if found["kind"] == "ARRAY":
        return int(found["nr_elems"]) * _size(by_id, found["type_id"])
    if found["kind"] in ("CONST", "VOLATILE", "TYPEDEF"):
        return _size(by_id, found["type_id"])
    return int(found.get("size", 8))  # else it is a pointer


def mutations(header: Path, inside: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(what, header): each field and member gone, each field's size, place and each member's name another one.

    Not of what is `inside`, which stays among the programs, nor of padding.
    """
    lines, block = header.read_text().splitlines(), ""
    for number, line in enumerate(lines):
        if line.endswith(" {"):
            block = line.removesuffix(" {")
        code = re.sub(r"/\*.*", "", line).rstrip()
        for instead in () if block in inside else _others(code):
            made = "\n".join([*lines[:number], instead, *lines[number + 1 :]]) + "\n"
            yield f"{block}: {code.strip()} -> {instead.strip()}", made


def _others(code: str) -> Iterator[str]:
    if fields := re.fullmatch(r"\t(__u\d+|struct \w+|char) (\w+(?:\[\w+\])?(?:, \w+(?:\[\w+\])?)*);", code):
        kind, names = fields[1], fields[2].split(", ")
        for n, name in enumerate(names):
            if name.startswith("none"):
                continue
            before, after = names[:n], names[n + 1 :]
            yield _declared(kind, [*before, *after])
            wider = _declared(kind, [_longer(name)])
            if kind == "__u32" and "[" not in name:
                wider = _declared("__u64", [name])
            yield " ".join(one for one in (_declared(kind, before), wider, _declared(kind, after)) if one)
            if after and not after[0].startswith("none"):
                yield _declared(kind, [*before, after[0], name, *after[1:]])
    elif re.match(r"\t[A-Z0-9_]+( = .*)?,$", code):
        yield ""
        yield re.sub(r"^\t([A-Z0-9_]+)", r"\t\1X", code)


def _declared(kind: str, names: list[str]) -> str:
    return f"\t{kind} {', '.join(names)};" if names else ""


def _longer(name: str) -> str:
    return re.sub(r"\[(\w+)\]", r"[\1 + 1]", name) if "[" in name else f"{name}[2]"
