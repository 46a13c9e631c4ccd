# SPDX-License-Identifier: Apache-2.0
"""P33: what we write is read, listed, loaded again and deleted by the nft of every release, without a crash."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from compat.releases import SUITES, nft
from support.rules import Pod
from support.rules import pod as made

from agent.backends.nftables.backend import NftablesBackend
from agent.backends.nftables.rendering import TABLES
from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.kernel.exec import run
from agent.reconciler.converge import settle

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]
VARIANTS = {
    "default": Redirect(),
    "no-dns": Redirect(dns=False),
    "no-ipv6": Redirect(ipv6=False),
    "ingress-only": Redirect(ingress_only=True),
    "virtual-interfaces": Redirect(virtual_interfaces=("eth1", "k6t-eth0")),
    "everything": Redirect(
        dns_to=("192.0.2.53", "2001:db8::53"),
        exclude=Exclusions(
            outbound_ports=((22, 22), (8000, 9000)),
            inbound_ports=((9090, 9090),),
            outbound_networks=("198.51.100.0/24", "2001:db8::/32"),
            inbound_networks=("192.0.2.0/24",),
            users=((0, 0), (1000, 2000)),
            interfaces=("net1",),
        ),
        refuse_non_tcp=True,
        preserve=True,
    ),
}


@pytest.fixture
def pod() -> Iterator[Pod]:
    with made("slu-compat") as one:
        yield one


@pytest.fixture(scope="module", params=SUITES)
def program(request: pytest.FixtureRequest) -> list[str]:
    return nft(str(request.param))


def rules(listed: str) -> int:
    return sum("rule" in item for item in json.loads(listed)["nftables"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("owned", [False, True], ids=["plain", "owned"])
def test_p33_every_nft_lists_reloads_and_deletes_our_tables(
    pod: Pod, program: list[str], variant: str, owned: bool
) -> None:
    want = VARIANTS[variant]
    backend = NftablesBackend(owned=owned)
    if owned and not (backend.probe().ok and backend.owned):
        pytest.skip("this kernel has no owned tables")
    settle(pod.target, want, [backend])
    own = pod.sh("nft list ruleset")
    tables = [name for name in TABLES if f"table inet {name} " in own]
    assert len(tables) >= 2

    def call(*words: str, stdin: str = "") -> str:
        return run([*program, *words], stdin=stdin, netns=pod.path).stdout

    text = call("list", "ruleset")
    assert [name for name in TABLES if f"table inet {name} " in text] == tables
    listed = rules(call("-j", "list", "ruleset"))
    assert listed == rules(pod.sh("nft -j list ruleset")) > 6
    assert text.count("sluice:") == listed, "every rule's comment is read"
    call("list", "table", "inet", tables[0])
    if owned:
        return  # deleting is refused to everybody but the owner, whatever nft says
    for name in tables:
        call("delete", "table", "inet", name)
    assert pod.sh("nft list ruleset") == ""
    call("-f", "-", stdin=text)
    assert rules(pod.sh("nft -j list ruleset")) == listed
    settle(pod.target, want, [backend])  # what another nft makes of our text may need mending, and is mended
    assert backend.plan(want, backend.read(pod.target)).differences == ()
    assert pod.sh("nft list ruleset") == own


def test_these_are_different_releases() -> None:
    versions = [run([*nft(suite), "--version"]).stdout.split()[1] for suite in SUITES]
    assert len(set(versions)) == len(SUITES), versions
    assert versions[0].startswith("v0.9.") and versions[2].startswith("v1.1.")
