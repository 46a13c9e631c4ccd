"""Which listeners of ztunnel are missing, and where a pod's application can be probed."""

from __future__ import annotations

import pytest

from agent.core.listeners import missing_listeners, probed
from agent.core.sockets import TcpSocket, TcpState

POD4, POD6 = "10.0.0.1", "fd00::1"


def listener(port: int, host: str = "0.0.0.0", mark: int | None = 0, v6_only: bool = False) -> TcpSocket:
    family, anyone = (6, "::") if ":" in host else (4, "0.0.0.0")
    return TcpSocket(family, (host, port), (anyone, 0), TcpState.LISTEN, port, mark=mark, v6_only=v6_only)


def ztunnels(*ports: int) -> list[TcpSocket]:
    return [listener(port, "::", 0x539) for port in ports]


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        ((), (15001, 15006, 15008)), ((15001, 15006, 15008), ()),
        ((15001, 15006), (15008,)), ((15053, 15008), (15001, 15006)),
    ],
)  # fmt: skip
def test_p03_what_ztunnel_does_not_listen_on(there: tuple[int, ...], missing: tuple[int, ...]) -> None:
    assert missing_listeners(ztunnels(*there), ingress_only=False) == missing


def test_what_is_not_needed_is_not_missed() -> None:
    assert missing_listeners(ztunnels(15001), ingress_only=True) == ()
    assert missing_listeners([], ingress_only=True) == (15001,)
    assert missing_listeners(ztunnels(15001, 15006), ingress_only=False, hbone=False) == ()
    assert missing_listeners(ztunnels(15001), ingress_only=False, hbone=False) == (15006,)


def test_an_applications_listener_on_ztunnels_port_does_not_count() -> None:
    right = ztunnels(15001, 15008)
    assert missing_listeners([*right, listener(15006)], ingress_only=False) == (15006,)
    assert missing_listeners([*right, listener(15006, mark=0x1539)], ingress_only=False) == ()
    assert missing_listeners([*right, listener(15006, mark=None)], ingress_only=False) == ()  # not told


def test_a_connection_on_a_port_is_no_listener() -> None:
    connected = TcpSocket(4, (POD4, 15001), (POD4, 9), TcpState.ESTABLISHED, 1, mark=0x539)
    assert missing_listeners([connected], ingress_only=True) == (15001,)


@pytest.mark.parametrize(
    ("sockets", "where"),
    [
        ([listener(8080), listener(80)], (POD4, 80)),
        ([listener(80, POD4)], (POD4, 80)),
        ([listener(80, "::")], (POD4, 80)),
        ([listener(80, "::", v6_only=True)], (POD6, 80)),
        ([listener(80, POD6)], (POD6, 80)),
        ([listener(80, POD6), listener(81)], (POD6, 80)),
        ([listener(80, "127.0.0.1"), listener(81, "::1"), listener(82, "10.0.0.9"), listener(83)], (POD4, 83)),
        ([listener(port) for port in (15001, 15006, 15008, 15053, 15080)], None),
        ([listener(80, mark=0x539)], None),
        ([], None),
    ],
)
def test_the_lowest_port_that_is_reached_from_outside(sockets: list[TcpSocket], where: tuple[str, int] | None) -> None:
    assert probed(sockets, (POD4, POD6), ipv6=True) == where


def test_the_pods_first_address_comes_first_and_ipv6_only_when_it_is_on() -> None:
    dual = [listener(80, "::")]
    assert probed(dual, (POD6, POD4), ipv6=True) == (POD6, 80)
    assert probed(dual, (POD6, POD4), ipv6=False) == (POD4, 80)
    assert probed(dual, (POD6,), ipv6=False) is None
    assert probed(dual, ("FD00:0::1",), ipv6=True) == (POD6, 80)
    assert probed(dual, (), ipv6=True) is None


def test_a_connection_is_nothing_to_probe() -> None:
    assert probed([TcpSocket(4, (POD4, 80), ("10.0.0.2", 9), TcpState.ESTABLISHED, 1)], (POD4,), ipv6=True) is None
