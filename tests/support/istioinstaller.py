# SPDX-License-Identifier: Apache-2.0
"""How istio-cni's agent installs its entry into a directory of CNI configurations, as a model over files by name.

Modelled on checkValidCNIConfig, createCNIConfigFile and Cleanup (docs/design/istio-cni.md, 1.10): the first list that
it finds is the primary one as long as the process lives; if that file disappears, the process waits for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from agent.install.conflists import readable
from agent.install.planning import View
from agent.migration import istio_confs

ENTRY = {"type": "istio-cni", "name": "istio-cni", "ambient_enabled": True, "exclude_namespaces": ["kube-system"]}


class Waits(Exception):
    """Its primary list has gone; it is not ready until somebody makes that file again or restarts it."""


@dataclass
class IstioInstaller:
    """One process. `owned`: the name of its own list, "" for the chained form."""

    owned: str = ""
    primary: str = ""
    file: str = ""

    def settle(self, files: dict[str, bytes], most: int = 3) -> int:
        """Until it finds nothing to do; how often it wrote. It looks again after each change in the directory."""
        for count in range(most):
            if self._right(files):
                return count
            self._write(files)
        return most

    def clean_up(self, files: dict[str, bytes]) -> None:
        if self.owned:
            files.pop(self.owned, None)
        elif self.file in files:
            network = json.loads(files[self.file])
            network["plugins"] = [one for one in network["plugins"] if one["type"] != "istio-cni"]
            files[self.file] = json.dumps(network).encode()

    def _right(self, files: dict[str, bytes]) -> bool:
        names = [conf.name for conf in istio_confs.confs(View(files)) if not conf.name.endswith(".json")]
        if not names:
            return True
        first = names[0]
        if self.owned and first != self.owned:
            self.primary = self.primary or first
            return False
        if first != self.file and not self.primary:
            self.primary = names[1] if self.owned else first
            return False
        if self.file not in files:
            return False
        types = self._types(files, self.file)
        if "istio-cni" not in types:
            return False
        return not self.owned or types >= self._types(files, self._primary(files))

    def _write(self, files: dict[str, bytes]) -> None:
        primary = self._primary(files)
        network: dict[str, Any] = json.loads(files[primary])
        if "type" in network:
            network.pop("cniVersion", None)
            network = {"name": "k8s-pod-network", "cniVersion": "0.3.1", "plugins": [network]}
        network["plugins"] = [one for one in network["plugins"] if one["type"] != "istio-cni"] + [ENTRY]
        self.file = self.owned or primary
        if not self.owned and primary.endswith(".conf"):
            del files[primary]
            self.file += "list"
        files[self.file] = json.dumps(network).encode()

    def _primary(self, files: dict[str, bytes]) -> str:
        stem = self.primary.removesuffix("list") if self.primary.endswith(".conflist") else self.primary
        for name in (self.primary, stem, f"{stem}list"):
            if name in files:
                return name
        raise Waits(self.primary)

    def _types(self, files: dict[str, bytes], name: str) -> set[str]:
        network = json.loads(files[name])
        return {one["type"] for one in network.get("plugins", [network])}


def picked(files: dict[str, bytes]) -> list[str]:
    """The plugins of the list that a runtime uses."""
    conf = istio_confs.picked(View({name: files[name] for name in readable(files)}))
    return [one["type"] for one in conf.plugins] if conf else []
