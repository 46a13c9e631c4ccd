# SPDX-License-Identifier: Apache-2.0
"""Records the backends that an earlier start chose: <run_dir>/backend.json, so that a restart chooses the same.

It is only a hint: a damaged record is logged and ignored, one from another kernel is not followed.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, fields
from pathlib import Path

from agent.backends.choose import Recorded
from agent.core.errors import SluiceError
from agent.sources.state.notes import replace_text

log = logging.getLogger("sluice.recorded")
_VERSION = 1


def load(run_dir: str) -> Recorded | None:
    """Reads the record; None if it is missing or unusable."""
    path = _path(run_dir)
    try:
        data = json.loads(path.read_bytes())
        if data.pop("version") != _VERSION:
            raise ValueError("it is of another version")
        kinds = {field.name: float if field.name == "time" else str for field in fields(Recorded)}
        for name, value in data.items():
            if type(value) is not kinds[name]:
                raise ValueError(f"{name} is of another type")
        return Recorded(**data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        log.warning("%s cannot be used (%s): choosing the backend again and recording it there", path, reason)
        return None


def save(run_dir: str, recorded: Recorded) -> None:
    """Raises SluiceError, with the path."""
    path = _path(run_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_text(path, json.dumps({"version": _VERSION, **asdict(recorded)}, indent=1, sort_keys=True))
    except OSError as error:
        raise SluiceError(f"cannot write {path}: {error.strerror}") from error


def forget(run_dir: str) -> None:
    """Removes the record: the next agent chooses again."""
    _path(run_dir).unlink(missing_ok=True)


def _path(run_dir: str) -> Path:
    return Path(run_dir) / "backend.json"
