# SPDX-License-Identifier: Apache-2.0
"""The control plane as a client: gRPC, certificates from Istio's CA or a SPIFFE agent, and istiod's resources.

Only the supervisor loads it, and only where a setting names one of them.
"""
