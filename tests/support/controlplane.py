# SPDX-License-Identifier: Apache-2.0
"""A control plane on grpcio, another stack than the product's: Istio's CA, a SPIFFE agent and istiod's delta ADS."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from cryptography import x509

from agent.core.wire.protobuf import Message, embedded, text
from agent.ztunnel.tls.development_ca import DevelopmentCa
from agent.ztunnel.tls.spiffe import parse

CA = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
SVIDS = "/SpiffeWorkloadAPI/FetchX509SVID"
ADS = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"


class ControlPlane(grpc.GenericRpcHandler):
    """Serves what a test puts in: `sign` for the CA, `pushes` for streams; `requests` has what clients sent."""

    def __init__(self, ca: DevelopmentCa) -> None:
        self.ca = ca
        self.metadata: list[dict[str, str]] = []
        self.requests: queue.Queue[Message] = queue.Queue()
        self.pushes: queue.Queue[bytes | None] = queue.Queue()  # None ends the stream
        self.sign: Callable[[str, Message], list[str]] = self._chain

    def service(self, details: Any) -> Any:
        self.metadata.append(dict(details.invocation_metadata))
        if details.method == CA:
            return grpc.unary_unary_rpc_method_handler(self._issue)
        if details.method == ADS:
            return grpc.stream_stream_rpc_method_handler(self._follow)
        return grpc.unary_stream_rpc_method_handler(self._push) if details.method == SVIDS else None

    def _issue(self, data: bytes, context: Any) -> bytes:
        request = Message(data)
        self.requests.put(request)
        asked = x509.load_pem_x509_csr(request.text(1).encode())
        assert asked.is_signature_valid
        names = asked.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        assert names.critical
        (uri,) = names.value.get_values_for_type(x509.UniformResourceIdentifier)
        return b"".join(text(1, part) for part in self.sign(uri, request))

    def _chain(self, uri: str, request: Message) -> list[str]:
        identity = parse(uri)
        assert identity is not None
        public = x509.load_pem_x509_csr(request.text(1).encode()).public_key()
        return [self.ca.sign(identity, public).decode(), self.ca.roots.decode()]

    def _follow(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        with ThreadPoolExecutor(1) as reader:
            reader.submit(self._read, requests)
            yield from self._push(b"", context)

    def _read(self, requests: Iterator[bytes]) -> None:
        with contextlib.suppress(grpc.RpcError):
            for data in requests:
                self.requests.put(Message(data))

    def _push(self, data: bytes, context: Any) -> Iterator[bytes]:
        while (each := self.pushes.get()) is not None:
            yield each
        context.cancel()


def response(kind: str, nonce: str, resources: dict[str, bytes], removed: tuple[str, ...] = ()) -> bytes:
    """A DeltaDiscoveryResponse; versions are the nonce."""
    return (
        b"".join(
            embedded(2, text(1, nonce) + embedded(2, text(1, kind) + embedded(2, value)) + text(3, name))
            for name, value in resources.items()
        )
        + text(4, kind)
        + text(5, nonce)
        + b"".join(text(6, name) for name in removed)
    )


@contextlib.contextmanager
def served(ca: DevelopmentCa, address: str = "127.0.0.1:0", age: int = 0) -> Iterator[tuple[ControlPlane, str]]:
    """Yields (the control plane, its address as a setting). Connections get GOAWAY after `age` ms, if it is not 0."""
    plane = ControlPlane(ca)
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool, options=[("grpc.max_connection_age_ms", age)] if age else None)
        server.add_generic_rpc_handlers((plane,))
        port = server.add_insecure_port(address)
        server.start()
        try:
            yield plane, address if address.startswith("unix:") else f"http://127.0.0.1:{port}"
        finally:
            plane.pushes.put(None)
            server.stop(None).wait()
