# SPDX-License-Identifier: Apache-2.0
"""`make test-vm` alone collects this tier: it builds a disk of Debian's packages and boots three machines of it."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("SLUICE_VM") else ["test_*.py"]
