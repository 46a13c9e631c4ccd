"""Which programs a report starts: the image has them all, but for the node's journal."""

from __future__ import annotations

import re
from pathlib import Path

from agent.diagnosis.bundle_contents import EXEMPTION, IN_POD, ON_HOST

IMAGE = Path(__file__).resolve().parents[3] / "deploy/image"


def test_the_image_has_the_programs_of_a_report() -> None:
    listed = (*IN_POD.values(), *ON_HOST.values(), *(argv for each in EXEMPTION.values() for argv in each))
    started = {argv[0] for argv in listed}
    (copied,) = re.findall(r'for each in (.+); do cp -L "/usr/sbin/\$each"', (IMAGE / "layout").read_text())
    xtables = {f"{word}-{each}{kind}" for word in ("iptables", "ip6tables") for each in ("nft", "legacy")
               for kind in ("", "-save", "-restore")}  # fmt: skip
    assert started <= {*copied.split(), *xtables}
    assert {"ip", "nft"} <= started, "the image has no program that nobody starts"
