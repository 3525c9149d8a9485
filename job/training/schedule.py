"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from bisect import bisect_right

from job.config import OptimizerConfig, ScheduleConfig


class Schedule:
    """Constant, step or cosine, each after a linear warmup.

    Args:
        schedule: its shape, in epochs.
        peak: the highest learning rate.
        steps_per_epoch: steps in an epoch.
        total_steps: steps in the whole run; the cosine reaches its end after the last one.
    """

    def __init__(self, schedule: ScheduleConfig, peak: float, steps_per_epoch: int, total_steps: int) -> None:
        self.schedule = schedule
        self.peak = peak
        self.warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
        self.falls = [round(epoch * steps_per_epoch) for epoch in schedule.step_epochs]
        self.total_steps = total_steps

    def __call__(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0 at the start of the run."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.schedule.name == "step":
            return self.peak * self.schedule.step_factor ** bisect_right(self.falls, step)
        if self.schedule.name == "cosine":
            return self.peak * self._cosine((step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.peak

    def _cosine(self, progress: float) -> float:
        final = self.schedule.final_fraction
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def peak_learning_rate(optimizer: OptimizerConfig, ranks: int) -> float:
    """The configured learning rate, scaled for a batch that grows with the number of ranks, if that was asked for.

    Linear: Goyal et al., "Accurate, large minibatch SGD", 2017. Square root: Krizhevsky, "One weird trick", 2014.
    """
    factor = {"none": 1.0, "linear": float(ranks), "sqrt": math.sqrt(ranks)}[optimizer.scale_learning_rate]
    return optimizer.learning_rate * factor
