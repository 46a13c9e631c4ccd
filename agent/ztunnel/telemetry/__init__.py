# SPDX-License-Identifier: Apache-2.0
"""Reports of ztunnel: records writes a line per connection."""
