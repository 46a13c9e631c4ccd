# SPDX-License-Identifier: Apache-2.0
"""`sluice report`: writes a support bundle, one file without secrets."""

from __future__ import annotations

import argparse
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from agent.cli import doctor, options
from agent.core.text import table
from agent.diagnosis.bundle import Bundle, safe
from agent.diagnosis.bundle_contents import gather


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "report",
        help="write a support bundle without secrets",
    )
    parser.add_argument(
        "--file",
        default="",
        metavar="FILE",
        help="file to write (default: sluice-report-NODE-TIME.tar.gz in this directory)",
    )
    parser.add_argument("--pod", default="", metavar="POD", help="include only this pod")
    parser.add_argument(
        "--addresses", choices=("plain", "hashed"), default="plain", help="hashed: replace each by the same word"
    )
    options.config(parser)
    options.finish(parser, _run, options.run_dir, options.output)


def _run(args: argparse.Namespace) -> int:
    facts, findings = doctor.diagnose(args.run_dir, args.config)
    node = facts.agent.status.get("node") or socket.gethostname()
    root = f"sluice-report-{safe(node)}"
    bundle = Bundle(root, secrets.token_hex(16) if args.addresses == "hashed" else "")
    gather(bundle, facts, doctor.value(facts, findings), doctor.text(findings), args.pod)
    path = Path(args.file or f"{root}-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    size = bundle.write(path)
    value = {
        "file": str(path),
        "bytes": size,
        "taken": sorted(bundle.files),
        "missing": dict(sorted(bundle.missing.items())),
    }
    lines = [f"{path}: {len(bundle.files)} files, {size} bytes, readable by root only"]
    if bundle.missing:
        lines += ["", table(("NOT TAKEN", "WHY"), sorted(bundle.missing.items()))]
    lines += ["", f"Read it before you send it: tar -xzf {path}; MANIFEST lists what is in it."]
    options.emit(args.output, value, "\n".join(lines))
    return 0
