"""What one node holds of istio-cni and of us, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.install.planning import View

ISTIO_CNI, SLUICE, SIDECAR = "istio-cni", "sluice", "sidecar"  # by whom a namespace was programmed


@dataclass(frozen=True, slots=True)
class Programmed:
    """One network namespace with rules in it: by whom, as the words above; `pod` is "" for one that we do not know.

    A sidecar's rules look the same whether istio-cni or an init container of the pod made them.
    """

    netns: str
    by: str
    pod: str = ""


@dataclass(frozen=True, slots=True)
class MigrationFacts:
    """`directory` and `plugins` are the runtime's, as the host names them.

    `agent`: where istio-cni's was met, "" when it does not run. `ours`: why our agent does not answer, "" when it does;
    then `ztunnels` are connected to it. `socket`: whether there is a file for more of them to connect to.
    `cached`: lists that name istio-cni among those that the runtime keeps to delete pods by; None when it keeps none.
    `host`: by whom the exemption of the node's probes was programmed, "" for nobody.
    """

    directory: str
    plugins: str
    view: View
    binary: bool = False
    agent: str = ""
    ours: str = ""
    ztunnels: int | None = None
    socket: bool = True
    cached: int | None = None
    programmed: tuple[Programmed, ...] = ()
    host: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def by(self, whom: str) -> tuple[Programmed, ...]:
        return tuple(one for one in self.programmed if one.by == whom)
