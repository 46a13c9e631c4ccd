"""A support bundle: every text in it goes through redacting first, and a manifest says what is there and what is not.

The same contents make the same bytes: entries are sorted, and carry neither time nor owner.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.core.errors import SluiceError
from agent.diagnosis import redaction

MOST = 1 << 20  # bytes of one file; of a longer one the end is kept
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]")


@dataclass(slots=True)
class Bundle:
    """`root` is the directory that everything is in; with a `salt` addresses are replaced."""

    root: str
    salt: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)

    def text(self, name: str, words: str) -> None:
        """Read for secrets first, then cut: what is cut off may be what says that the rest is one."""
        clean = redaction.text(_end(words, 4 * MOST))
        if len(clean) > MOST:
            self.cut[name] = len(words)
            clean = _end(clean, MOST)
        self._add(name, clean)

    def value(self, name: str, given: Any) -> None:
        """As JSON. One that is too long is a text like any other."""
        words = json.dumps(redaction.value(given), indent=2, default=str) + "\n"
        if len(words) > MOST:
            self.text(name, words)
        else:
            self._add(name, words)

    def lacks(self, name: str, why: str) -> None:
        self.missing[name] = " ".join(redaction.text(why).split())

    def write(self, path: Path) -> int:
        """For root's eyes alone; bytes written. A file that is there is not written over. Raises SluiceError."""
        data = self._packed()
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
        except OSError as error:
            raise SluiceError(f"{path}: {error.strerror}; give another --file") from None
        return len(data)

    def manifest(self) -> str:
        """A line for each file, then what could not be had and why."""
        lines = ["Read it before you send it: secrets were removed by their names and forms, and some may be left.", ""]
        if self.salt:
            lines[1:1] = ["Addresses are replaced, each by the same word throughout."]
        for name, data in sorted(self.files.items()):
            cut = f"; the end of {self.cut[name]} characters" if name in self.cut else ""
            lines.append(f"{name}  {len(data)} bytes{cut}")
        lines += ["", "Not taken:"] + [f"{name}: {why}" for name, why in sorted(self.missing.items())]
        return self._hidden("\n".join(lines) + "\n")

    def _packed(self) -> bytes:
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as outer, tarfile.open(fileobj=outer, mode="w") as tar:
            for name, data in sorted({**self.files, "MANIFEST": self.manifest().encode()}.items()):
                info = tarfile.TarInfo(f"{self.root}/{name}")
                info.size = len(data)
                info.mode = 0o600
                tar.addfile(info, io.BytesIO(data))
        return packed.getvalue()

    def _add(self, name: str, words: str) -> None:
        self.files[name] = self._hidden(words).encode(errors="replace")

    def _hidden(self, words: str) -> str:
        return redaction.without_addresses(words, self.salt) if self.salt else words


def safe(name: str) -> str:
    """As part of a file's name: nothing that leads elsewhere, or hides."""
    return _UNSAFE.sub("_", name).lstrip(".")[:120] or "_"


def _end(words: str, most: int) -> str:
    """Whole lines, and no part of a key or certificate whose beginning is cut off."""
    if len(words) <= most:
        return words
    kept = words[-most:].partition("\n")[2]
    end, begin = kept.find("-----END "), kept.find("-----BEGIN ")
    divided = end >= 0 and (begin < 0 or end < begin)
    return kept[end:].partition("\n")[2] if divided else kept
