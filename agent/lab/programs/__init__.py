# SPDX-License-Identifier: Apache-2.0
"""Programs that run inside the lab's pods. Standard library only: `python -m agent.lab.programs.NAME`."""
