"""Looking up a kernel's configuration.

A table stands in its kernel's file as rows `(conditions, configuration)`, the first match wins. A condition names a
fact and the largest value (sizes, which are compared and so become guards) or the exact value (dtypes) it may have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = tuple[Mapping[str, Any], Mapping[str, int]]


def lookup(table: Sequence[Row], **facts: Any) -> Mapping[str, int]:
    """The configuration of the first row whose conditions all hold. The last row of a table has no conditions.

    >>> lookup([({"rows": 4, "dtype": "float32"}, {"BLOCK": 1}), ({}, {"BLOCK": 8})], rows=3, dtype="float16")
    {'BLOCK': 8}
    """
    for conditions, configuration in table:
        if all(
            facts[name] == bound if isinstance(bound, str) else facts[name] <= bound
            for name, bound in conditions.items()
        ):
            return configuration
    raise LookupError(f"no row of the table matches {facts}, its last row must have no conditions")
