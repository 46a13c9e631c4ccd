# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import sys
import time

import pytest

from agent.kernel.logs import Formatter


def line(message: str, *args: object, failed: bool = False) -> str:
    info = None
    if failed:
        try:
            raise ValueError("\x1b[31m\nERROR forged")
        except ValueError:
            info = sys.exc_info()
    record = logging.LogRecord("sluice", logging.ERROR, "", 0, message, args, info)
    return Formatter("%(levelname)s %(message)s").format(record)


def test_what_a_pod_is_called_neither_begins_a_record_nor_reaches_the_terminal() -> None:
    assert line("pod %s: %s", "a", "\x1b]0;P\x07\nERROR forged") == "ERROR pod a: \\x1b]0;P\\x07\n    ERROR forged"


def test_times_are_in_utc_as_those_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        record = logging.makeLogRecord({"created": 1_772_600_767.0, "msecs": 890.0, "msg": "x"})
        assert Formatter("%(asctime)s %(message)s").format(record) == "2026-03-04T05:06:07.890Z x"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_script_and_a_traceback_stay_readable() -> None:
    assert line("refused:\n%s", "table a {\n\tchain b\n}") == "ERROR refused:\n    table a {\n    \tchain b\n    }"
    shown = line("failed", failed=True)
    assert "\n    Traceback" in shown and "\n    ERROR forged" in shown and "\x1b" not in shown
