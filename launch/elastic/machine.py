"""This machine as the ground of a job whose ranks may die: its places, its memory, and processes that wait."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from job.checkpoints import commits
from job.checkpoints.commits import Progress
from job.distributed import gpus
from launch.elastic.gang import Crew, LocalGang
from launch.elastic.places import Place
from launch.elastic.supervisor import GO_ON

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Machine:
    """A :class:`launch.elastic.supervisor.Ground` of one machine.

    Args:
        train: the command of a rank, with all arguments that last.
        ranks: how many places there are.
        memory: the folder for the commits.
        run_dir: the run's folder.
    """

    command = "launch/local.sh"

    def __init__(self, train: Sequence[str], ranks: int, memory: Path, run_dir: Path) -> None:
        self._train = train
        self._places = [Place("", slot) for slot in range(ranks)]
        self._memory = memory
        self._run_dir = run_dir
        self._crew: Optional[Crew] = None  # for as many ranks as there are places

    def places(self) -> Sequence[Place]:
        """All: a machine neither grows nor shrinks."""
        return self._places

    def start(self, begin: Sequence[str], places: Sequence[Place], most: int) -> LocalGang:
        """Start a rank at each of ``places``."""
        commits.forget_progress(self._memory)
        variables = {commits.FOLDER: str(self._memory), **self._gpus(places)}
        crew = self._crew if _VISIBLE not in variables else None  # what waits has seen all GPUs
        gang = LocalGang([*self._train, *begin], places[:most], variables, crew)
        self.close()
        return gang

    def progress(self) -> Optional[Progress]:
        """As rank 0 has written it down."""
        return commits.progress(self._memory)

    def prepare(self) -> None:
        """Have processes wait to be the next ranks."""
        if not self._crew:
            self._crew = Crew([*self._train, *GO_ON], len(self._places))

    def together(self, place: Place) -> Sequence[Place]:
        """That one alone."""
        return [place]

    def save(self) -> None:
        """Bring the newest commit to the disk, if it is newer than what is there."""
        commits.bring_to_disk(self._memory, self._run_dir)

    def close(self) -> None:
        """Nobody need wait any more."""
        if self._crew:
            self._crew.dismiss()
        self._crew = None

    def _gpus(self, places: Sequence[Place]) -> dict[str, str]:
        """What shows the ranks the GPUs of their places alone, where some are left out."""
        count = len(self._places)
        if len(places) == count or not gpus.count(gpus.listing(), os.environ.get(_VISIBLE)):
            return {}
        entries = (os.environ.get(_VISIBLE) or ",".join(map(str, range(count)))).split(",")
        return {_VISIBLE: ",".join(entries[place.slot] for place in places)}
