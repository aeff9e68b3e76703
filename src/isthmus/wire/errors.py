"""What a decoder raises, and nothing else: the one error of the wire."""

from __future__ import annotations


class WireError(ValueError):
    """A message or payload that breaks its schema: names the field or tensor.

    >>> print(WireError("round", "-1 is below 0"))
    round: -1 is below 0
    """

    def __init__(self, field: str, problem: str) -> None:
        self.field, self.problem = field, problem
        super().__init__(f"{field}: {problem}")
