# SPDX-License-Identifier: Apache-2.0
"""The mesh as ztunnel knows it: workloads, services and policies, and the decisions that follow from them.

mesh_model has the values, local_mesh parses them from a file, mesh_store holds and finds them, load_balancing chooses
an endpoint, routes decides where a connection goes, authorization whether it may, and baggage describes a workload.
"""
