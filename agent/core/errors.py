# SPDX-License-Identifier: Apache-2.0
"""Errors as types: the operation that failed, on what, and the kernel's or peer's own words."""

from __future__ import annotations


class SluiceError(Exception):
    """Something failed that a person has to read: one line, what, on which pod, why, and what to do."""


class SettingsError(SluiceError):
    """A file, flag or environment variable that cannot be used as it stands; names the place."""


class UnreachableError(SluiceError):
    """The agent cannot be asked: it does not run, or the caller is not root."""


class NetnsError(SluiceError):
    """A path or descriptor that is not the network namespace it was said to be."""


class HostNetnsError(NetnsError):
    """The namespace is the node's own: rules there would take the whole node off the network."""


class ForeignNetnsError(NetnsError):
    """The namespace holds none of the pod's addresses, so it is not proven to be that pod's."""


class PodGoneError(NetnsError):
    """The pod's namespace is no longer that pod's and nothing refers to it any more: the pod has ended."""


class PodEndingError(NetnsError):
    """The pod's sandbox is being removed: no process is left in its namespace, so nothing needs repair."""


class KernelError(SluiceError):
    """The kernel refused an operation. `errno` is its number; the message holds its words."""

    def __init__(self, operation: str, errno: int, cause: str) -> None:
        super().__init__(f"{operation}: {cause}")
        self.errno = errno


class TeardownError(KernelError):
    """The kernel refused an operation of a captured pod as it does while a sandbox is removed. It may be just that."""

    def __init__(self, refused: KernelError) -> None:
        SluiceError.__init__(self, str(refused))
        self.errno = refused.errno
        for note in getattr(refused, "__notes__", ()):
            self.add_note(note)


class StaleError(KernelError):
    """The rule set changed between reading and applying; reading again and retrying is right."""


class RevertedError(KernelError):
    """Another process reverted the rules as often as one pass applied them."""


class ProtocolError(SluiceError):
    """A peer (CNI plugin, ztunnel) sent what its protocol does not allow."""


class ZtunnelError(SluiceError):
    """No ztunnel took the pod: none connected, it refused, or it did not answer in time."""


class NoZtunnelError(ZtunnelError):
    """No ztunnel is connected: retries wait until one connects, which is reported."""


class SilentZtunnelError(ZtunnelError):
    """ztunnel acknowledged the pod and does not listen there on all of its `ports`."""

    def __init__(self, ports: tuple[int, ...]) -> None:
        listed = ", ".join(map(str, ports))
        super().__init__(f"ztunnel took the pod, but nothing listens in it on {listed}; see ztunnel's log")
        self.ports = ports


class TakenPortError(SluiceError):
    """Processes of the pod listen on ports of ztunnel. What would be redirected to them is dropped."""

    def __init__(self, foreign: tuple[str, ...]) -> None:
        super().__init__(f"{'; '.join(foreign)}; new connections are refused until it ends or uses another port")


class CommandError(SluiceError):
    """A program we started ended badly; holds its command line and the last line of its errors."""


class KubeError(SluiceError):
    """The Kubernetes API refused or could not be reached: `status` of HTTP (0: no answer), `reason` its own word."""

    def __init__(self, message: str, status: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
