# SPDX-License-Identifier: Apache-2.0
"""The parts of a lab: nodes, pods, addresses, names and paths, as plain values without effects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from agent.core.errors import SettingsError
from agent.core.names import DATAPLANE_MODE

DEFAULT_PREFIX: Final = "slulab"
DOMAIN: Final = "lab.test"
BPFFS: Final = Path("/sys/fs/bpf")

# `down` removes every namespace and file with the prefix, so no other program may use the prefix: it starts with "slu",
# contains no dash (the dash ends it), and is not the agent's own /run/sluice.
_PREFIX = re.compile(r"slu[a-z0-9]{1,9}")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,28}[a-z0-9])?")


class PodProgram(StrEnum):
    """A program inside a pod; it listens on its port of `PORTS`."""

    WEB = "web"
    ECHO = "echo"
    IPERF = "iperf"
    DNS = "dns"


PORTS: Final = {PodProgram.WEB: 80, PodProgram.ECHO: 7000, PodProgram.IPERF: 5201, PodProgram.DNS: 53}


@dataclass(frozen=True, slots=True)
class PodSpec:
    """One pod; a pod without programs is a client, in which other modules start theirs."""

    node: str
    namespace: str
    name: str
    _: KW_ONLY
    enrolled: bool = False
    programs: tuple[PodProgram, ...] = ()

    @property
    def ref(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def key(self) -> str:
        """The name in files and network namespaces, which cannot contain a slash."""
        return f"{self.namespace}-{self.name}"

    @property
    def annotations(self) -> dict[str, str]:
        return {DATAPLANE_MODE: "ambient"} if self.enrolled else {}


@dataclass(frozen=True, slots=True)
class LabSpec:
    """The whole lab. Raises SettingsError for an invalid name or number, and for names that are not unique."""

    prefix: str = DEFAULT_PREFIX
    nodes: tuple[str, ...] = ("node1", "node2")
    pods: tuple[PodSpec, ...] = ()

    def __post_init__(self) -> None:
        if not _PREFIX.fullmatch(self.prefix) or self.prefix == "sluice":
            raise SettingsError(
                f"lab prefix {self.prefix!r}: must be 'slu' and 1 to 9 characters of a-z and 0-9, and not 'sluice'"
            )
        for word in (*self.nodes, *(part for pod in self.pods for part in (pod.namespace, pod.name))):
            if not _LABEL.fullmatch(word):
                raise SettingsError(f"lab name {word!r}: 1 to 30 of a-z, 0-9 and inner dashes")
        # A node's name is also the name of its port on the segment's bridge.
        if not 1 <= len(self.nodes) <= 200 or max(map(len, self.nodes)) > 15:
            raise SettingsError("a lab has 1 to 200 nodes, with names of at most 15 characters")
        # /run/<prefix> has the nodes' directories and these.
        names = [*self.nodes, *(pod.key for pod in self.pods), "lan", "pods", "processes"]
        if len(set(names)) != len(names):
            raise SettingsError("lab: names of nodes and pods must differ, and not be lan, pods or processes")
        for pod in self.pods:
            if pod.node not in self.nodes:
                raise SettingsError(f"lab pod {pod.ref}: no node {pod.node!r}")

    def pod(self, ref: str) -> PodSpec:
        """Returns a pod by NAMESPACE/NAME, or by NAME alone if that is unique."""
        pods = [pod for pod in self.pods if ref in (pod.ref, pod.name)]
        if len(pods) != 1:
            names = ", ".join(pod.ref for pod in self.pods)
            raise SettingsError(f"lab pod {ref!r}: {'ambiguous' if pods else 'unknown'}; there are {names}")
        return pods[0]

    @property
    def lan(self) -> str:
        return f"{self.prefix}-lan"

    def netns_name(self, name: str) -> str:
        """Returns the namespace's name of a node, or of a pod by its `key`."""
        return f"{self.prefix}-{name}"

    def netns_path(self, name: str) -> Path:
        return Path("/run/netns", self.netns_name(name))

    @property
    def run_dir(self) -> Path:
        return Path("/run", self.prefix)

    @property
    def peers_file(self) -> Path:
        """The owners of all addresses, for all agents; in a cluster they come from the API of Kubernetes."""
        return self.run_dir / "peers.yaml"

    def node_dir(self, node: str) -> Path:
        return self.run_dir / node

    def bpf_dir(self, node: str) -> Path:
        """Returns the pin directory of the node's agent: each agent on the machine has its own."""
        return BPFFS / self.netns_name(node)

    def underlay(self, node: str) -> tuple[str, str]:
        """Returns the node's IPv4 and IPv6 addresses on the segment, without prefix lengths."""
        number = self.nodes.index(node) + 1
        return f"192.0.2.{number}", f"2001:db8:1::{number:x}"

    def pod_cidrs(self, node: str) -> tuple[str, str]:
        number = self.nodes.index(node) + 1
        return f"10.244.{number}.0/24", f"fd00:10:244:{number:x}::/64"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LabSpec:
        """Returns the lab of a dictionary as `dataclasses.asdict` makes it, read back from JSON."""
        pods = tuple(PodSpec(**{**pod, "programs": tuple(map(PodProgram, pod["programs"]))}) for pod in data["pods"])
        return cls(data["prefix"], tuple(data["nodes"]), pods)


def default_spec(prefix: str = DEFAULT_PREFIX) -> LabSpec:
    """Returns the lab of the demo: three pods enrolled, one excluded, and a DNS server that the agent ignores."""
    serving = (PodProgram.WEB, PodProgram.ECHO)
    return LabSpec(
        prefix=prefix,
        pods=(
            PodSpec("node2", "kube-system", "dns", programs=(PodProgram.DNS,)),
            PodSpec("node1", "shop", "web", enrolled=True, programs=serving),
            PodSpec("node1", "shop", "client", enrolled=True),
            PodSpec("node2", "shop", "db", enrolled=True, programs=(*serving, PodProgram.IPERF)),
            PodSpec("node2", "legacy", "batch", programs=serving),
        ),
    )
