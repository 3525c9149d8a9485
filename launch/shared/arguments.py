"""Imported by the launchers: what they add to the arguments of train.py. launch/local.sh does the same in bash."""

from __future__ import annotations

from collections.abc import Sequence


def with_auto_resume(arguments: Sequence[str]) -> list[str]:
    """``arguments``, and ``run.resume=auto`` unless they say themselves what becomes of a run that is there."""
    decided = any(argument.startswith(("run.resume=", "run.overwrite=")) for argument in arguments)
    return [*arguments] if decided else [*arguments, "run.resume=auto"]
