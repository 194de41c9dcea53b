"""Passes over a whole tensor, before its first block is made: whichever threads ask for what is learnt share the work.

A pass is cut into runs, at places that depend on the tensor alone. Threads take runs as they come; what they learn is
summed in the order of the runs, so that the result does not depend on how many they are, or which was faster.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from surgery.algorithms.kernel import Kernel, Totals

Run = tuple[int, int]


class Passes:
    """What a kernel learns of a whole tensor, once.

    Args:
        kernel: the algorithm, set up for the tensor.
        runs: the pieces that a pass is cut into.
        begin: called before the first pass, by one thread.
        observe: looks at one piece, for the stage whose number is the length of what it is given.
    """

    def __init__(
        self,
        kernel: Kernel,
        runs: Sequence[Run],
        begin: Callable[[], None],
        observe: Callable[[Run, Sequence[Any]], Totals],
    ) -> None:
        self._kernel = kernel
        self._runs = runs
        self._begin = begin
        self._observe = observe
        self._state = threading.Condition()
        self._found: list[Any] = []
        self._parts: dict[int, Totals] = {}
        """What was learnt of runs whose turn to be summed has not come."""
        self._totals: Totals = ()
        self._handed = self._summed = 0
        self._begun = False
        self._error: BaseException | None = None
        self.looked = False
        """Whether any pass went over the whole tensor."""

    def get(self) -> list[Any]:
        """Return the findings of all stages; take part in the passes that are still to be made.

        Raises:
            SurgeryError: what a run raised, in whichever thread.
        """
        while (number := self._take()) is not None:
            try:
                self._put(number, self._observe(self._runs[number], self._found))
            except BaseException as error:
                with self._state:
                    self._error = error
                    self._state.notify_all()
                raise
        return self._found

    def _take(self) -> int | None:
        """Hand out the next run; wait while others have the last ones of a stage; ``None``: all is known."""
        with self._state:
            if not self._begun:
                self._begun = True
                if self._kernel.stages:
                    self._begin()
                self._skip()
            while len(self._found) < self._kernel.stages:
                if self._error is not None:
                    raise self._error
                if self._handed < len(self._runs):
                    self._handed += 1
                    return self._handed - 1
                self._state.wait()
            return None

    def _put(self, number: int, part: Totals) -> None:
        """Add what a run gave, once all runs before it are added; conclude the stage after the last one."""
        with self._state:
            self._parts[number] = part
            while (part_ := self._parts.pop(self._summed, None)) is not None:
                self._totals = part_ if self._summed == 0 else tuple(map(np.add, self._totals, part_))
                self._summed += 1
            if self._summed == len(self._runs):
                self._found.append(self._kernel.conclude(self._totals, self._found))
                self.looked = True
                self._totals, self._handed, self._summed = (), 0, 0
                self._skip()
                self._state.notify_all()

    def _skip(self) -> None:
        while len(self._found) < self._kernel.stages and not self._kernel.needs(self._found):
            self._found.append(None)
