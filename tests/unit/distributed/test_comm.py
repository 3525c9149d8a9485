"""How often Horovod looks for work, by where ranks are and what they compute on."""

from __future__ import annotations

import pytest

from job.distributed.comm import cycle_ms


@pytest.mark.parametrize(
    ("on_gpu", "together", "over_mpi", "cores_a_rank", "expected"),
    [
        (True, True, True, 8, "0.1"), (True, False, False, 4, "0.1"),
        (True, False, True, 3, "0.5"), (True, True, False, 1, "1"),
        (False, True, True, 1, "5"), (False, True, False, 8, "5"),
        (False, False, True, 8, "0.5"), (False, False, False, 8, "1"),
    ],
)  # fmt: skip
def test_the_cycle_is_short_where_sums_are_horovods_and_cores_are_free(
    on_gpu: bool, together: bool, over_mpi: bool, cores_a_rank: int, expected: str
) -> None:
    assert cycle_ms(on_gpu, together, over_mpi, cores_a_rank) == expected
