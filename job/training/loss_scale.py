"""The factor that lifts small gradients into the range of float16, and that is taken out of them again."""

from __future__ import annotations

from typing import Any, Optional

FIRST = 2.0**16
LARGEST = 2.0**24
SMALLEST = 1.0
GROWTH_INTERVAL = 2000  # steps


class LossScale:
    """A power of two, so that scaling by it rounds nothing. The same on all ranks, as the verdicts are that it follows.

    It doubles after :data:`GROWTH_INTERVAL` good steps in a row, and halves when gradients overflow, whose step is
    skipped then: the rule of Micikevicius et al., "Mixed precision training", 2018, with the numbers that NVIDIA's
    apex, PyTorch's GradScaler and MXNet's amp have.
    """

    def __init__(self) -> None:
        self.value = FIRST
        self._good_steps = 0  # since it last changed

    def grow(self) -> None:
        """A step was good."""
        self._good_steps += 1
        if self._good_steps >= GROWTH_INTERVAL:
            self.value, self._good_steps = min(2 * self.value, LARGEST), 0

    def shrink(self) -> bool:
        """Gradients overflowed. Returns whether a smaller scale may mend that; at its smallest nothing is changed."""
        if self.value == SMALLEST:
            return False
        self.value, self._good_steps = self.value / 2, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """What it has come to."""
        return {"value": self.value, "good_steps": self._good_steps}

    def load_state_dict(self, state: Optional[dict[str, Any]]) -> None:
        """Go on from there; from the beginning, if the run was in another type so far."""
        if state:
            self.value, self._good_steps = state["value"], state["good_steps"]
