# SPDX-License-Identifier: Apache-2.0
"""Which programs a report starts: the image has them all, but for the node's journal."""

from __future__ import annotations

import re
from pathlib import Path

from agent.diagnosis.bundle_contents import EXEMPTION, IN_POD

IMAGE = Path(__file__).resolve().parents[3] / "deploy/image"


def test_the_image_has_the_programs_of_a_report() -> None:
    listed = (*IN_POD.values(), *(argv for each in EXEMPTION.values() for argv in each))
    started = {argv[0] for argv in listed}
    copied = re.findall(r"^cp -L /usr/sbin/(\S+) ", (IMAGE / "layout").read_text(), re.MULTILINE)
    xtables = {f"{word}-{each}{kind}" for word in ("iptables", "ip6tables") for each in ("nft", "legacy")
               for kind in ("", "-save", "-restore")}  # fmt: skip
    assert started <= {*copied, *xtables}
    assert {*copied} <= started, "the image has a program that is never started"
