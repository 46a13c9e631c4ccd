# SPDX-License-Identifier: Apache-2.0
"""`sluice doctor` and `sluice report`: facts of a node and checks on them; and the same as a support bundle."""
