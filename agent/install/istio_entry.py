# SPDX-License-Identifier: Apache-2.0
"""istio-cni's entry in CNI configurations, and which of them are its own. Pure.

Forms (docs/design/istio-cni.md, 1.10): chained, an entry in the primary's own list; owned, a list of istio-cni's with
the primary's plugins (02-istio-cni.conflist); alone, a file with its entry only (YYY-istio-cni.conf, with Multus).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from agent.core.names import CNI_TYPE
from agent.install import conflists
from agent.install.conflists import ISTIO, Conf, Json

CHAINED: Final = "chained"
OWNED: Final = "owned"
ALONE: Final = "alone"


def entry(conf: Conf) -> Json:
    return next((one for one in conf.plugins if one["type"] == ISTIO), {})


def form(conf: Conf, every: Sequence[Conf]) -> str:
    """Returns CHAINED, OWNED or ALONE for a configuration with istio-cni's entry.

    `every`: all configurations of the directory except our own lists.
    """
    rest = [kind for kind in _types(conf) if kind != ISTIO]  # without our entry, which may have been inserted
    if not rest:
        return ALONE
    others = [other for other in every if other is not conf and not conflists.mentions(other.network, ISTIO)]
    wraps = any(_types(other) == rest for other in others)
    return OWNED if wraps or (others and ISTIO in conf.name) else CHAINED


def owned(every: Sequence[Conf]) -> list[Conf]:
    """Returns the lists that istio-cni made around another one; its agent keeps them in front of all others."""
    return [conf for conf in every if entry(conf) and form(conf, every) == OWNED]


def _types(conf: Conf) -> list[str]:
    return [one["type"] for one in conf.plugins if one["type"] != CNI_TYPE]
