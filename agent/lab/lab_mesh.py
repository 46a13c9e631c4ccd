# SPDX-License-Identifier: Apache-2.0
"""The lab's mesh: a file with all pods that every ztunnel follows, and a certificate authority for development."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from agent.core.errors import SluiceError
from agent.core.names import ZTUNNEL_ADMIN_PORT
from agent.kernel.process_http import page
from agent.lab import istio_ztunnel
from agent.lab.lab_pods import LabPods
from agent.lab.lab_spec import LabSpec
from agent.lab.processes import Child, await_ready

# Settings of the agent: the port that ztunnel has in addition.
SETTINGS: Final = {"ztunnel_ports": ["15001", "15006", "15008"]}
READY_SECONDS: Final = 20.0
_MESH_FILE: Final = "mesh.yaml"
_AUTHORITY: Final = "development-ca"  # a directory of the lab
_REVOKED: Final = "revoked.pem"


def options(spec: LabSpec, mesh: Path | None = None) -> tuple[str, ...]:
    """Returns the options of `sluice ztunnel` for the lab's mesh, or for the given file and the lab's identities."""
    path = mesh or spec.run_dir / _MESH_FILE
    return ("--mesh", str(path), "--identities", f"development:{spec.run_dir / _AUTHORITY}")


def write(pods: LabPods, policies: Sequence[dict[str, Any]] = ()) -> int:
    """Writes the file with the pods that are up, and returns their number. The ztunnels follow it."""
    listed = [(pod.spec, (pod.ipv4, pod.ipv6)) for pod in pods.up().values()]
    text = istio_ztunnel.workloads(listed, hbone=True) + yaml.safe_dump({"policies": list(policies)})
    path = pods.spec.run_dir / _MESH_FILE
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)
    return len(listed)


def revoke(spec: LabSpec, *serials: int) -> Path:
    """Writes the list of the lab's revoked certificates, and returns its path for --revocation-lists."""
    from agent.ztunnel.tls.development_ca import DevelopmentCa  # loads the library cryptography

    path = spec.run_dir / _REVOKED
    fresh = path.with_suffix(".new")
    fresh.write_bytes(DevelopmentCa(spec.run_dir / _AUTHORITY).revocation_list(serials))
    return fresh.replace(path)


def config_dump(ztunnel: Child) -> dict[str, Any]:
    """Returns the state that a ztunnel shows. Raises SluiceError."""
    found: dict[str, Any] = json.loads(page(ztunnel.pid, ZTUNNEL_ADMIN_PORT, "/config_dump"))
    return found


def await_workloads(ztunnel: Child, count: int) -> None:
    """Waits until the ztunnel knows so many workloads: it resets connections of a pod that it does not know."""

    def knows() -> bool:
        with contextlib.suppress(SluiceError):  # it does not serve the page yet
            return len(config_dump(ztunnel)["workloads"]) == count
        return False

    await_ready(ztunnel, knows, READY_SECONDS, "in the lab's mesh")
