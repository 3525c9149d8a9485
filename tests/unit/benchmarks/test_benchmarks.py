"""The pure parts of the benchmarks, against cases that were worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import compare, scaling, step_parts
from benchmarks.intervals import median, ratio


def test_the_interval_of_turns_that_are_all_alike_is_their_value() -> None:
    assert median(np.full(5, 3.0)) == (3.0, 3.0, 3.0)
    assert ratio(np.full(5, 3.0), np.full(5, 2.0)) == (1.5, 1.5, 1.5)


def test_a_ratio_is_of_the_medians_and_its_interval_holds_it() -> None:
    found = ratio(np.array([1.0, 4.0, 90.0]), np.array([1.0, 2.0, 3.0]))
    assert found == (2.0, 1.0, 30.0)  # of three turns: now and then the first is drawn twice, or the last


def test_turns_that_slow_down_together_leave_the_ratio_alone() -> None:
    noise = np.array([1.0, 1.7, 1.1, 3.0, 1.3])
    assert ratio(2 * noise, noise) == (2.0, 2.0, 2.0)


def test_the_table_says_how_much_faster_this_project_is() -> None:
    lines = compare.table("step", {compare.OURS: [0.4, 0.4], "another": [0.8, 0.8]})
    assert lines[2] == f"| {compare.OURS} | 50.0 | 50.0 to 50.0 | 5,120 | | |"
    assert lines[3] == "| another | 100.0 | 100.0 to 100.0 | 2,560 | 2.00 | 2.00 to 2.00 |"


def test_arithmetic_and_bytes_of_a_convolution() -> None:
    work = step_parts.convolution(images=2, channels=3, size=5, filters=4, kernel=3)
    assert work.operations == 2 * (2 * 3 * 3) * (4 * 3 * 3 * 3)  # a product and a sum, outputs, values for each
    assert work.bytes == 4 * (2 * 3 * 25 + 2 * 4 * 9 + 4 * 3 * 9)


def test_an_operator_takes_at_least_the_longer_of_arithmetic_and_bytes() -> None:
    assert step_parts.Work(1e9, 1e6).least_ms(1e11, 1e10) == 10.0
    assert step_parts.Work(1e9, 1e9).least_ms(1e11, 1e10) == 100.0


def test_the_calls_that_onednn_tells_of_become_a_step_of_each_operator() -> None:
    call = "dnnl_verbose,exec,cpu,{},jit:any,{},src_f32::blocked:abcd:f0 dst_f32::blocked:abcd:f0,,alg:x y:1,{},{}"
    lines = [
        "dnnl_verbose,info,oneDNN v2.4.4",
        call.format("inner_product", "backward_data", "mb32ic1250oc128", "0.5"),
        call.format("inner_product", "backward_data", "mb32ic1250oc128", "0.7"),
        call.format("reorder", "undef", "32x10", "0.2"),
    ]
    assert step_parts.by_operator(lines, steps=2) == pytest.approx({"dense 1, data": 0.6, "other": 0.1})


def test_a_sum_sends_all_but_its_own_part_twice() -> None:
    assert scaling.transfer_seconds(4, 8e9, 1e9) == 12.0


def test_nccl_s_latency_by_hand() -> None:
    way = scaling.Nccl(cycle_seconds=0.0)
    assert way.sum_seconds(1, 1e9) == 0.0
    assert way.sum_seconds(8, 0) == pytest.approx((4.4 + 2 * 7 * 0.52) * 1e-6)
    assert way.sum_seconds(32, 0) == pytest.approx((4.4 + 2 * (7 * 0.936 + 2 * 5.0)) * 1e-6)  # four nodes: two levels


def test_a_step_by_hand() -> None:
    class Way:
        def sum_seconds(self, ranks: int, bytes_: float) -> float:
            return 1.0 + bytes_ / ranks

    network = scaling.Network("one BatchNorm of three channels", (3,), 10)
    found = scaling.step(network, ranks=2, shards=4, compute=5.0, way=Way())
    assert found.statistics == 2 + (4 * 7 * 8 + 4 * 6 * 8) / 2
    assert found.gradients == 1 + 10 * 8 / 2
    assert found.efficiency == 5.0 / (5.0 + found.statistics + found.gradients)


def test_a_group_keeps_its_size_where_ranks_become_more() -> None:
    steps = [scaling.step(scaling.RESNET50, ranks, ranks, 1.0, scaling.Nccl(), group=8) for ranks in (16, 1024)]
    assert steps[0].statistics == pytest.approx(steps[1].statistics)
    one_rank = scaling.step(scaling.RESNET50, 1, 8, 1.0, scaling.Nccl(), group=8)
    assert one_rank.statistics == 0


def test_a_measured_way_meets_both_points_that_it_was_calibrated_with() -> None:
    way = scaling.Measured({2: (0.001, 0.005)})
    assert way.sum_seconds(2, 8 * scaling.SMALL) == pytest.approx(0.001)
    assert way.sum_seconds(2, 8 * scaling.LARGE) == pytest.approx(0.005)


def test_resnet_50_has_53_batch_norms() -> None:
    assert len(scaling.RESNET50.channels) == 53
    assert sum(scaling.RESNET50.channels) == 26_560
