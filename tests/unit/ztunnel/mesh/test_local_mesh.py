# SPDX-License-Identifier: Apache-2.0
"""Bad files are refused with the place of the error."""

from __future__ import annotations

import pytest

from agent.ztunnel.mesh import local_mesh
from tests.unit.ztunnel.mesh.meshes import FILE


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("node: n2", "nodes: n2", r"workloads\[1\]\.nodes: is not a known key"),
        ("10.0.0.2]", "10.0.0.1]", "address /10.0.0.1 occurs twice"),
        ("[10.0.0.3]", "[10.0.0.300]", r"workloads\[2\]\.workloadIps\[0\]: '10\.0\.0\.300'"),
        ("hboneMtlsPort: 15008}\n", "hboneMtlsPort: 70000}\n", r"networkGateway\.hboneMtlsPort: is no number"),
        ("action: Deny", "action: Audit", r"policies\[1\]\.action: is not one of Allow, Deny"),
        ("!Exact", "!Regex", "no YAML"),
        ("  - - - destinationPorts: [22]", "  - 22", r"policies\[1\]\.rules: is no list of lists of lists"),
        ("  - - - destinationPorts: [22]", "  - - - port: 22", r"policies\[1\]\.rules\.port: is not a known key"),
        ("uid: c1//v1/Pod/shop/db", "uid: c1//v1/Pod/shop/web", "workload c1//v1/Pod/shop/web occurs twice"),
        ("  services: {}\n", "", r"workloads\[0\]\.services: is missing"),
    ],
)
def test_an_error_has_its_place(old: str, new: str, error: str) -> None:
    assert old in FILE
    with pytest.raises(local_mesh.MeshFileError, match=error):
        local_mesh.parse(FILE.replace(old, new, 1))
