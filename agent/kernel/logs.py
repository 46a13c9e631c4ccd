# SPDX-License-Identifier: Apache-2.0
"""Log format of the daemons: nothing that a pod controls can look like a log record of its own."""

from __future__ import annotations

import logging
import sys
import time

from agent.core.text import printable


class Formatter(logging.Formatter):
    """Further lines of a record, a script or a traceback, are indented; control characters are escaped.

    Times are in UTC and in the form of the events, so that a log and `sluice events` can be read side by side.
    """

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        return "\n    ".join(map(printable, super().format(record).split("\n")))


def start(level: str | int, form: str) -> None:
    """Logs to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(form))
    logging.basicConfig(level=level, handlers=[handler])
