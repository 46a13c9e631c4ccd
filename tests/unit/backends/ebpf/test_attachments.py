# SPDX-License-Identifier: Apache-2.0
"""Programs and links: what is not as wanted, and what is done about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.backends.ebpf.attachments import Attach, Attached, Detach, Load, Unpin, steps
from agent.backends.ebpf.object_files import EGRESS, INGRESS, LOOKUP, NODE, POD, BpfProgram
from agent.kernel.bpf.link import LinkInfo

WANT: Mapping[str, BpfProgram] = {"lookup": LOOKUP, "ingress-2": INGRESS, "egress-2": EGRESS}
IDS = {program.name: 100 + n for n, program in enumerate(POD)}


def good(want: Mapping[str, BpfProgram] = WANT, **changes: Any) -> Attached:
    links = {name: LinkInfo(n, IDS[program.name], 7) for n, (name, program) in enumerate(want.items(), 1)}
    return Attached(**{"ids": IDS, "links": links, **changes})


def changes(want: Mapping[str, BpfProgram], have: Attached) -> list[Any]:
    return [step.payload for step, _ in steps(want, have)]


def wrongs(want: Mapping[str, BpfProgram], have: Attached) -> list[str]:
    return [wrong for _, wrong in steps(want, have) if wrong]


def test_nothing_is_done_when_all_is_right() -> None:
    assert changes(WANT, good()) == []


def test_from_nothing_objects_are_loaded_once_each_and_first() -> None:
    found = changes(WANT, Attached())
    assert found[:2] == [Load("lookup"), Load("wire")]
    assert found[2:] == [Attach(name, program) for name, program in WANT.items()]
    assert len(changes({one.name: one for one in NODE}, Attached())) == len({one.object for one in NODE}) + len(NODE)


def test_another_builds_program_is_replaced_in_its_link_and_then_unpinned() -> None:
    old = good(ids={}, old=("lookup@0badf00d", "ingress@0badf00d", "egress@0badf00d"))
    assert changes(WANT, old) == [
        Load("lookup"), Load("wire"), *(Attach(name, program, swap=True) for name, program in WANT.items()),
        *(Unpin(name) for name in old.old),
    ]  # fmt: skip
    assert "egress-2 runs another program" in wrongs(WANT, old)


def test_a_program_that_was_loaded_again_has_another_number() -> None:
    """The pin's: so links that run the former one are known."""
    have = good(ids={**IDS, "egress": 555})
    assert changes(WANT, have) == [Attach("egress-2", EGRESS, swap=True)]


@pytest.mark.parametrize("gone", WANT)
def test_a_missing_link_is_made_and_a_detached_one_made_anew(gone: str) -> None:
    links = dict(good().links)
    detached = good(links={**links, gone: LinkInfo(9, links[gone].program_id, 0)})
    del links[gone]
    for have, word in ((good(links=links), "not attached"), (detached, "detached")):
        assert changes(WANT, have) == [Attach(gone, WANT[gone])]
        assert wrongs(WANT, have) == [f"{gone} is {word}"]


def test_a_link_of_an_interface_that_is_gone_is_removed() -> None:
    have = good({**WANT, "ingress-3": INGRESS})
    assert changes(WANT, have) == [Detach("ingress-3")]


def test_programs_of_another_build_that_nothing_runs_are_no_difference() -> None:
    have = good(old=("lookup@0badf00d",))
    assert (changes(WANT, have), wrongs(WANT, have)) == ([Unpin("lookup@0badf00d")], [])


@given(
    st.dictionaries(
        st.sampled_from([*WANT, "egress-9"]), st.tuples(st.sampled_from([0, 100, 101, 102]), st.integers(0, 1))
    ),
    st.sets(st.sampled_from([*IDS])),
)
def test_carried_out_the_steps_leave_nothing_to_do(links: dict[str, tuple[int, int]], loaded: set[str]) -> None:
    have = Attached(
        {name: IDS[name] for name in loaded}, {n: LinkInfo(1, p, t) for n, (p, t) in links.items()}, ("x@1",)
    )
    ids, made, old = dict(have.ids), dict(have.links), set(have.old)
    for change in changes(WANT, have):
        match change:
            case Load(name):
                ids |= {program.name: IDS[program.name] for program in POD if program.object == name}
            case Attach(link, program, swap):
                assert program.name in ids, "attached after it was loaded"
                assert not swap or made[link].target, "a detached link cannot be given another program"
                made[link] = LinkInfo(2, ids[program.name], 7)
            case Detach(link):
                del made[link]
            case Unpin(name):
                old.remove(name)
    assert changes(WANT, Attached(ids, made, tuple(old))) == []


def test_what_is_not_wanted_goes_before_its_like_is_made() -> None:
    """An agent was killed between making a link and giving it its name: tcx takes no program twice."""
    links = dict(good().links)
    links["ingress-2~77"] = links.pop("ingress-2")
    assert changes(WANT, good(links=links)) == [Detach("ingress-2~77"), Attach("ingress-2", INGRESS)]
