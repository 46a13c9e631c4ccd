# SPDX-License-Identifier: Apache-2.0
"""The owner of rules, under names that all mesh agents share, and the tags by which Sluice recognises its own. Pure.

Tags are chained: each rule's comment holds a hash of the tag before it and of the rule's own text. So the list of tags
of a chain identifies its rules and their order, and drift is "the list of tags differs": rules need not be parsed back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from hashlib import blake2b

from agent.core.names import TAG_PREFIX

TAG = re.compile(TAG_PREFIX + "[0-9a-f]{12}")


class Owner(Enum):
    NONE = ""
    SLUICE = "sluice"
    FOREIGN = "another agent"


def owner_of(parts: Iterable[Owner]) -> Owner:
    """Returns the owner of the whole: Sluice as soon as any part is Sluice's."""
    owners = set(parts)
    return next((owner for owner in (Owner.SLUICE, Owner.FOREIGN) if owner in owners), Owner.NONE)


def tag_chain(texts: Iterable[str], seed: str) -> tuple[str, ...]:
    """Returns the tag of each rule text in order; `seed` names where the rules stand, such as table and chain."""
    tags: list[str] = []
    previous = seed
    for text in texts:
        previous = blake2b(f"{previous}\n{text}".encode(), digest_size=6).hexdigest()
        tags.append(TAG_PREFIX + previous)
    return tuple(tags)
