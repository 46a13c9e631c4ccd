# SPDX-License-Identifier: Apache-2.0
"""Istio's istiod over the tests' API server, and ztunnels that get everything from it, in a namespace of their own."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from support import apiserver_objects
from support.apiserver import ApiServer
from support.hbone import Node
from support.istio_peer import REAL
from support.ztunnel import PEER4, PEER6, POD4, POD6, SECONDS, Place, Ztunnel

from agent.kernel.exec import start

ISTIOD = os.environ.get("SLUICE_ISTIOD", "")
VIP = "10.99.0.1"
ADS = "127.0.0.1:15012"
_KINDS = ("authorizationpolicies.security", "peerauthentications.security", "serviceentries.networking",
          "workloadentries.networking")  # fmt: skip
_READY = [{"type": "Ready", "status": "True"}, {"type": "PodScheduled", "status": "True"}]
Json = dict[str, Any]


def custom(kind: str, name: str, spec: Json, namespace: str = "demo") -> Json:
    """An object of Istio's."""
    group = "security" if kind in ("AuthorizationPolicy", "PeerAuthentication") else "networking"
    return {
        "apiVersion": f"{group}.istio.io/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace, "uid": f"{kind}-{name}"},
        "spec": spec,
    }


def pod(name: str, addresses: list[str], *, namespace: str = "demo", node: str = "", account: str = "") -> Json:
    """A ready pod of its own node, redirected to the ztunnel there."""
    value = apiserver_objects.pod(
        name, namespace=namespace, node=node or f"node-{name}", address=addresses[0],
        labels={"app": name, "service.istio.io/canonical-name": name, "service.istio.io/canonical-revision": "v1"},
        annotations={"ambient.istio.io/redirection": "enabled"} if namespace == "demo" else {},
    )  # fmt: skip
    value["spec"]["serviceAccountName"] = account or name
    value["status"] |= {"podIPs": [{"ip": each} for each in addresses], "conditions": _READY}
    return value


def service(name: str, address: str, **spec: Any) -> Json:
    value = apiserver_objects.service(name, address, [80], "demo")
    value["spec"] |= {"selector": {"app": name}, "type": "ClusterIP", "clusterIPs": [address], **spec}
    value["spec"]["ports"] = [{"name": "tcp", "port": 80, "targetPort": 8080, "protocol": "TCP"}]
    return value


def two_pods() -> list[Json]:
    """Two nodes with a pod and a ztunnel each, and services of the second pod."""
    found = [
        {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
         "metadata": {"name": f"{kind}.istio.io", "uid": kind}, "spec": {}}
        for kind in _KINDS
    ]  # fmt: skip
    found += [apiserver_objects.namespace(name) for name in ("istio-system", "default")]
    found.append(apiserver_objects.namespace("demo", ambient="ambient"))
    for name, addresses in (("web", [POD4, POD6]), ("shop", [PEER4, PEER6])):
        node = apiserver_objects.node(f"node-{name}")
        node["metadata"]["labels"] = {"topology.kubernetes.io/region": "north", "topology.kubernetes.io/zone": "n1"}
        ztunnel = {"namespace": "istio-system", "node": f"node-{name}", "account": "ztunnel"}
        found += [node, pod(name, addresses), pod(f"ztunnel-{name}", ["127.0.0.1"], **ztunnel)]
    found += [service("shop", VIP), service("all", "None", selector={"app": "shop"})]
    return found


class Istiod:
    """The process and its API server. `page` is GET of a page in the namespace."""

    def __init__(self, folder: Path, place: Place) -> None:
        self.folder, self.place, self.log = folder, place, folder / "istiod.log"
        self.server = ApiServer(folder / "api", place=place.call)
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, *more: str) -> None:
        """Starts it, with `more` arguments, and waits until it serves."""
        kubeconfig = self.folder / "kubeconfig"
        kubeconfig.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": self.server.url, "certificate-authority": self.server.ca_file}}],
            "users": [{"name": "test", "user": {"token": self.server.token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }))  # fmt: skip
        environment = {
            "HOME": str(self.folder), "POD_NAME": "istiod-0",
            "POD_NAMESPACE": "istio-system", "SERVICE_ACCOUNT": "istiod", "REVISION": "default",
            "PILOT_ENABLE_AMBIENT": "true", "CA_TRUSTED_NODE_ACCOUNTS": "istio-system/ztunnel",
            "CLUSTER_ID": "Kubernetes", "PILOT_CERT_PROVIDER": "istiod", "INJECTION_WEBHOOK_CONFIG_NAME": "",
            "VALIDATION_WEBHOOK_CONFIG_NAME": "", "ENABLE_LEADER_ELECTION": "false",
        }  # fmt: skip
        with self.log.open("ab") as out:
            self.process = start(
                [ISTIOD, "discovery", "--kubeconfig", str(kubeconfig), "--domain", "cluster.local",
                 "--meshConfig", str(self.folder / "mesh"), "--shutdownDuration", "1s", *more],
                netns=self.place.path, env=environment, stdout=out, stderr=out,
            )  # fmt: skip
        self._wait(lambda: self.page(8080, "/ready")[0] == 200, "istiod is not ready")

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def page(self, port: int, path: str) -> tuple[int, str]:
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        with contextlib.closing(link), contextlib.suppress(OSError):
            self.place.call(link.connect)
            link.request("GET", path)
            answer = link.getresponse()
            return answer.status, answer.read().decode()
        return 0, ""

    def environment(self, node: Node) -> dict[str, str]:
        """What the DaemonSet of Istio's chart gives a ztunnel of the node, with a token that the API server knows."""
        name = f"ztunnel-{node.account}"
        secret = self.server.store.objects["secrets"]["istio-system", "istio-ca-secret"]
        roots, token = node.folder / "root-cert.pem", node.folder / "token"
        roots.write_bytes(base64.b64decode(secret["data"]["ca-cert.pem"]))
        token.write_text(f"token-of-{name}")
        own = self.server.store.objects["pods"]["istio-system", name]
        self.server.rights.users[f"token-of-{name}"] = {
            "username": "system:serviceaccount:istio-system:ztunnel",
            "groups": ["system:serviceaccounts", "system:serviceaccounts:istio-system", "system:authenticated"],
            "extra": {"authentication.kubernetes.io/pod-name": [name],
                      "authentication.kubernetes.io/pod-uid": [own["metadata"]["uid"]]},
        }  # fmt: skip
        return {
            "CA_ADDRESS": ADS, "XDS_ADDRESS": ADS, "ISTIO_META_CLUSTER_ID": "Kubernetes", "INPOD_ENABLED": "true",
            "TERMINATION_GRACE_PERIOD_SECONDS": "30", "POD_NAME": name, "POD_NAMESPACE": "istio-system",
            "NODE_NAME": f"node-{node.account}", "INSTANCE_IP": "127.0.0.1", "SERVICE_ACCOUNT": "ztunnel",
            "ISTIO_META_ENABLE_HBONE": "true", "RUST_LOG": "info", "PROXY_MODE": "shared",
            "INPOD_UDS": str(node.agent.path), "AUTH_TOKEN": str(token), "XDS_ROOT_CA": str(roots),
            "CA_ROOT_CA": str(roots), "ALT_XDS_HOSTNAME": "istiod.istio-system.svc",
            "ALT_CA_HOSTNAME": "istiod.istio-system.svc",
        }  # fmt: skip

    def _wait(self, done: Any, what: str) -> None:
        until = time.monotonic() + 3 * SECONDS
        while not done():
            assert self.process is not None
            assert self.process.poll() is None and time.monotonic() < until, f"{what}: {self.log.read_text()[-3000:]}"
            time.sleep(0.2)


class FedZtunnel(Ztunnel):
    """A ztunnel process with what Istio's DaemonSet gives it: ours, or Istio's if `real`, which has Istio's ports."""

    def __init__(self, istiod: Istiod, node: Node, *, port: int = 15100, real: bool = False) -> None:
        self.path, self.log, self._istiod = node.folder / "records", node.folder / "log", istiod
        self._port = 15000 if real else port
        ours = [sys.executable, "-m", "agent", "proxy", "ztunnel", "--records", str(self.path)]
        for at, name in enumerate(("admin", "stats", "ready")):
            ours += [f"--{name}-address", f"127.0.0.1:{port + (0, 20, 21)[at]}"]
        with self.log.open("ab") as out:
            self.process = start([REAL] if real else ours, netns=istiod.place.path, env=istiod.environment(node),
                                 stdout=out, stderr=out)  # fmt: skip
        node.ztunnel = self
        node.announce()

    def dump(self) -> Json:
        """What /config_dump has."""
        found: Json = json.loads(self._istiod.page(self._port, "/config_dump")[1])
        return found

    def metrics(self) -> str:
        return self._istiod.page(self._port + 20, "/metrics")[1]


@contextlib.contextmanager
def istiod(folder: Path, others: Iterable[Json] = ()) -> Iterator[Istiod]:
    """Serves the cluster of `two_pods`, with other objects besides."""
    folder.mkdir(exist_ok=True)
    (folder / "mesh").write_text("trustDomain: cluster.local\nrootNamespace: istio-system\n")
    with contextlib.ExitStack() as made:
        place = Place(f"slu-istiod-{os.getpid()}")
        made.callback(place.remove)
        found = Istiod(folder, place)
        made.enter_context(found.server)
        for value in (*two_pods(), *others):
            found.server.put(value)
        made.callback(found.end)
        found.run()
        yield found
