# SPDX-License-Identifier: Apache-2.0
"""Log format of the daemons: nothing that a pod controls can look like a log record of its own."""

from __future__ import annotations

import logging
import sys

from agent.core.text import printable


class Formatter(logging.Formatter):
    """Further lines of a record, a script or a traceback, are indented; control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n    ".join(map(printable, super().format(record).split("\n")))


def start(level: str | int, form: str) -> None:
    """Logs to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(form))
    logging.basicConfig(level=level, handlers=[handler])
