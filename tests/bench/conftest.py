"""The hosts of the benchmark's own tests are those of hosts/: `tests/run bench`."""

from __future__ import annotations

from hosts.conftest import lab, namespaces

__all__ = ["lab", "namespaces"]  # pytest finds fixtures by their names here
