# SPDX-License-Identifier: Apache-2.0
"""A support bundle: every text is redacted, and a manifest lists what is present and what is missing.

The same contents give the same bytes: entries are sorted, and carry neither time nor owner.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from agent.core.errors import SluiceError
from agent.diagnosis import redaction

MOST = 1 << 20  # bytes of one file; of a longer one the end is kept
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]")


@dataclass(slots=True)
class Bundle:
    """The files of a bundle below the directory `root`; with a `salt` addresses are replaced."""

    root: str
    salt: str = ""
    _: KW_ONLY
    files: dict[str, bytes] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)

    def text(self, name: str, content: str) -> None:
        """Redacts the text, then cuts it: the cut part may be what marks the rest as a secret."""
        clean = redaction.text(_end(content, 4 * MOST))
        if len(clean) > MOST:
            self.cut[name] = len(content)
            clean = _end(clean, MOST)
        self._add(name, clean)

    def value(self, name: str, given: Any) -> None:
        """Adds a value as JSON. One that is too long is added as text."""
        content = json.dumps(redaction.value(given), indent=2, default=str) + "\n"
        if len(content) > MOST:
            self.text(name, content)
        else:
            self._add(name, content)

    def lacks(self, name: str, why: str) -> None:
        self.missing[name] = " ".join(redaction.text(why).split())

    def write(self, path: Path) -> int:
        """Writes the bundle for root only and returns its bytes. Never overwrites a file. Raises SluiceError."""
        data = self._packed()
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
        except OSError as error:
            raise SluiceError(f"{path}: {error.strerror}; give another --file") from None
        return len(data)

    def manifest(self) -> str:
        """Lists each file, then what is missing and why."""
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

    def _add(self, name: str, content: str) -> None:
        self.files[name] = self._hidden(content).encode(errors="replace")

    def _hidden(self, content: str) -> str:
        return redaction.without_addresses(content, self.salt) if self.salt else content


def safe(name: str) -> str:
    """Returns the name as a safe part of a file name: no separators, not hidden."""
    return _UNSAFE.sub("_", name).lstrip(".")[:120] or "_"


def _end(content: str, most: int) -> str:
    """Returns whole lines from the end, without part of a key or certificate that begins before them."""
    if len(content) <= most:
        return content
    kept = content[-most:].partition("\n")[2]
    end, begin = kept.find("-----END "), kept.find("-----BEGIN ")
    divided = end >= 0 and (begin < 0 or end < begin)
    return kept[end:].partition("\n")[2] if divided else kept
