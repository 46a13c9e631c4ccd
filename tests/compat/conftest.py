# SPDX-License-Identifier: Apache-2.0
"""`make compat` alone collects this tier: it downloads Debian packages, which no other tier may depend on."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("SLUICE_COMPAT") else ["test_*.py"]
