# SPDX-License-Identifier: Apache-2.0
"""Removes secrets from texts and values, and addresses on request. Pure.

The replacement of a secret shows nothing of it: neither its length nor a digest.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Mapping
from typing import Any, Final

from agent.core import names
from agent.core.model.exclusions import PREFIXES

REMOVED: Final = "[removed]"
_STEMS = (
    "token|passw(?:or)?d|passphrase|secret|credential|authorization|cookie|api[-_.]?key|private[-_.]?key"
    "|access[-_.]?key|client-key|client-certificate|(?<![a-z])(?:pwd|auth)(?![a-z])"
)
# A key, variable or flag with a name that marks a secret. It starts a word, or a long word would cost its square.
_NAME = rf"(?<![\w.-])[\w.-]*(?:{_STEMS})[\w.-]{{0,40}}"
_SECRET = re.compile(_NAME, re.IGNORECASE)
_HARMLESS = re.compile(r".*(?:file|path|dir|name|ref|kind|type|total|count|seconds)", re.IGNORECASE)
_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL)
# By their form: JSON web tokens, and those of GitHub, GitLab, Slack, AWS and k3s.
_FORMS = re.compile(
    r"(?<![\w-])eyJ[\w-]{5,}\.[\w-]+(?:\.[\w-]*)?|\b(?:gh[pousr]_|xox[abprs]-|glpat-|AKIA|K10)[\w:-]{10,}"
)
_SCHEME = re.compile(r"\b(bearer|basic)([ \t]+)[\w.~+/=-]{8,}", re.IGNORECASE)
_URL = re.compile(r"((?<![\w+.-])[a-z][a-z0-9+.-]{0,20}://)[^\s/@\"']{1,200}@", re.IGNORECASE)
_NAMED = rf"(?P<name>(?P<quote>\\?[\"'])?(?P<bare>{_NAME})(?(quote)(?P=quote)))"
# A block of YAML, a list, a mapping, or a text in one of three kinds of quotes.
_WHOLE = (
    r"[|>][-+]?[ \t]*\n(?:[ \t]+.*(?:\n|\Z))+|\[[^\]]*\]?|\{[^}]*\}?|'[^'\n]*'?"
    r"|\"(?:[^\"\\]|\\.)*(?:\"|\Z)|\\\"(?:\\\\\\\"|[^\"\\]|\\[^\"])*(?:\\\"|\Z)"
)
# Any other value ends with the line, in JSON before the next comma, on a command line with the word.
_COLON = re.compile(
    rf"{_NAMED}(?P<between>[ \t]*:\s*)(?P<value>{_WHOLE}|(?(quote)[^\s,;}}\]]+|\S[^\n]*))", re.IGNORECASE
)
_EQUALS = re.compile(rf"{_NAMED}(?P<between>[ \t]*=[ \t]*|[ \t]+)(?P<value>{_WHOLE}|\S+)", re.IGNORECASE)
_NOTHING = frozenset(("", "true", "false", "null", "none", "not set"))
_ADDRESS = re.compile(
    r"(?<![\w.:])(?:(?:[0-9a-fA-F]{0,4}:){2,7}\d{1,3}(?:\.\d{1,3}){3}|(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4})(?!\w)"
    r"|(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\w)"
)
_MAC = re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}(?![\w:])")
_OUR_KEYS = ("istio.io/", "ambient.istio.io/", "sidecar.istio.io/", *PREFIXES)


def text(content: str) -> str:
    """Redacts a text of any form: YAML, JSON, a log, a command line, an environment."""
    content = _PEM.sub(f"{REMOVED} (PEM)", content)
    content = _EQUALS.sub(_without_value, _COLON.sub(_without_value, content))
    content = _FORMS.sub(REMOVED, content)
    content = _SCHEME.sub(rf"\1\2{REMOVED}", content)
    return _URL.sub(rf"\1{REMOVED}@", content)


def _without_value(match: re.Match[str]) -> str:
    given, between = match["value"], match["between"]
    flag = not between.strip()
    if _HARMLESS.fullmatch(match["bare"]) or (flag and not match["bare"].startswith("--")):
        return match[0]
    if given.strip("\\\"'").lower() in _NOTHING:
        return match[0]
    mark = next((mark for mark in ('\\"', '"', "'") if given.startswith(mark)), "")
    after = "\n" if given.startswith(("|", ">")) and given.endswith("\n") else ""
    return f"{match['name']}{between}{mark}{REMOVED}{mark}{after}"


def value(given: Any, key: str = "") -> Any:
    """Redacts a JSON value: replaces the whole value of a secret's name, and annotations that Sluice does not read."""
    if _SECRET.fullmatch(key) and not _HARMLESS.fullmatch(key) and given not in (None, "", False, True):
        return REMOVED
    if isinstance(given, Mapping):
        if key in ("annotations", "io.kubernetes.cri.pod-annotations"):
            return {name: value(one) if str(name).startswith(_OUR_KEYS) else REMOVED for name, one in given.items()}
        return {str(name): value(one, str(name)) for name, one in given.items()}
    if isinstance(given, list | tuple):
        return [value(one) for one in given]
    return text(given) if isinstance(given, str) else given


def without_addresses(content: str, salt: str) -> str:
    """Replaces each address by a word that is the same in the whole bundle and shows only the family.

    Loopback, unspecified, and Sluice's own probe addresses stay: they are the same everywhere.
    """

    def digest(of: object) -> str:
        return hashlib.sha256(f"{salt}{of}".encode()).hexdigest()[:8]

    def hashed(match: re.Match[str]) -> str:
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            return match[0]
        if address.is_loopback or address.is_unspecified or str(address) in _KNOWN:
            return match[0]
        return f"ipv{address.version}-{digest(address)}"

    # Some networks make link addresses from a pod's address.
    return _ADDRESS.sub(hashed, _MAC.sub(lambda match: f"mac-{digest(match[0].lower())}", content))


_KNOWN = frozenset((names.PROBE_IPV4, names.PROBE_IPV6))
