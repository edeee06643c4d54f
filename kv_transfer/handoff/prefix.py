"""Prefix: how far something is complete whose pieces end in any order. Pure."""


class Prefix:
    """Everything before `end` is complete; so are the pieces beyond it that are remembered until the gap closes."""

    def __init__(self, end: int) -> None:
        self.end = end
        self._beyond: dict[int, int] = {}

    def add(self, first: int, count: int) -> None:
        """Pieces never overlap."""
        if count:
            self._beyond[first] = count
        while (count := self._beyond.pop(self.end, 0)) > 0:
            self.end += count
