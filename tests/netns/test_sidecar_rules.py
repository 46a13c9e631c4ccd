# SPDX-License-Identifier: Apache-2.0
"""A sidecar's chain has the name of one of Sluice's: it is neither emptied nor removed.

Where Sluice needs the name, the pod is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.rules import Pod, layers
from support.rules import pod as made

from agent.core.errors import KernelError
from agent.core.model.redirect import Redirect
from agent.kernel.exec import run
from agent.reconciler.converge import settle

pytestmark = pytest.mark.root
# As istio-init writes them, in short.
SIDECAR = """*nat
:ISTIO_OUTPUT - [0:0]
:ISTIO_REDIRECT - [0:0]
-A OUTPUT {jump}-j ISTIO_OUTPUT
-A ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -j ISTIO_REDIRECT
-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
COMMIT
"""


@pytest.fixture
def pod() -> Iterator[Pod]:
    with made("slu-sidecar") as one:
        yield one


@pytest.mark.parametrize("jump", ["", "-p tcp "], ids=["all", "tcp"])
@pytest.mark.parametrize("choice", ["iptables", "iptables-legacy"])
def test_a_sidecars_chain_is_left_alone_and_the_pod_refused(pod: Pod, choice: str, jump: str) -> None:
    variant = "legacy" if choice == "iptables-legacy" else "nft"
    run([f"iptables-{variant}-restore"], stdin=SIDECAR.format(jump=jump), netns=pod.path)
    before = pod.dump()
    with pytest.raises(KernelError, match="chain ISTIO_OUTPUT of table nat is foreign"):
        settle(pod.target, Redirect(), layers(choice))
    settle(pod.target, Redirect(), layers("nftables"), layers(choice)[-1:])  # the other backend is left behind
    assert "-A ISTIO_OUTPUT -j ISTIO_REDIRECT" in pod.sh(f"iptables-{variant}-save -t nat")
    settle(pod.target, None, layers("nftables"), layers(choice)[-1:])
    assert pod.dump() == before
