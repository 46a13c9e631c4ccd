"""Named numbers of netlink messages are those of the kernel's headers, asked of a C compiler."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

from agent.core.wire import rtnetlink

PREFIXES: dict[type[IntEnum], str] = {
    rtnetlink.Rtm: "RTM_",
    rtnetlink.Group: "RTNLGRP_",
    rtnetlink.Ifla: "IFLA_",
    rtnetlink.LinkInfo: "IFLA_INFO_",
    rtnetlink.LinkXdp: "IFLA_XDP_",
    rtnetlink.Ifa: "IFA_",
    rtnetlink.Rta: "RTA_",
    rtnetlink.Fra: "FRA_",
    rtnetlink.Action: "FR_ACT_",
    rtnetlink.RouteType: "RTN_",
    rtnetlink.Table: "RT_TABLE_",
    rtnetlink.Scope: "RT_SCOPE_",
}
# Younger than the headers of Debian 12.
YOUNGER = {"FRA_DSCP", "FRA_FLOWLABEL"}


def named() -> Iterator[tuple[str, int]]:
    for kind, prefix in PREFIXES.items():
        for member in kind:
            yield prefix + {"IIFNAME": "IFNAME"}.get(member.name, member.name), member.value


def test_every_number_is_the_kernels(tmp_path: Path) -> None:
    checks = [f'_Static_assert({name} == {value}, "{name}");' for name, value in named() if name not in YOUNGER]
    assert len(checks) > 60
    source = tmp_path / "numbers.c"
    headers = ("rtnetlink", "fib_rules", "if_link", "if_addr")
    source.write_text("\n".join([*(f"#include <linux/{name}.h>" for name in headers), *checks, ""]))
    done = subprocess.run(["cc", "-fsyntax-only", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
