# SPDX-License-Identifier: Apache-2.0
"""Chained tags: each rule's comment holds a hash of the tag before it and of the rule's own text.

So the list of tags of a chain identifies its rules and their order, and drift is "the list of tags differs":
rules need not be parsed back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b

from agent.core.names import TAG_PREFIX

TAG = re.compile(TAG_PREFIX + "[0-9a-f]{12}")


def chain(texts: Iterable[str], seed: str) -> tuple[str, ...]:
    """Returns the tag of each rule text in order; `seed` names where the rules stand, such as table and chain."""
    tags: list[str] = []
    previous = seed
    for text in texts:
        previous = blake2b(f"{previous}\n{text}".encode(), digest_size=6).hexdigest()
        tags.append(TAG_PREFIX + previous)
    return tuple(tags)
