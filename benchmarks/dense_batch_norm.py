"""The tutorial's exercise: ``python -m benchmarks.dense_batch_norm``, about 25 minutes on two cores.

Trains the tutorial's network with and without BatchNorm on the dense layer, at three learning rates with three seeds,
prints the table of docs/batch_norm_on_dense.md and draws docs/images/batch_norm_on_dense.png.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.runs import IMAGES, Run, run

RATES = (0.05, 0.2, 0.8)
SEEDS = (0, 1, 2)
VARIANTS = {False: ("convolutions only", "tab:blue"), True: ("and the dense layer", "tab:orange")}


def main() -> None:
    """Run what is missing, as many side by side as there are cores; print, and draw."""
    settings = list(product(RATES, VARIANTS, SEEDS))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = dict(zip(settings, pool.map(lambda setting: _run(*setting), settings)))
    _print_table(runs)
    _draw(runs)


def _run(rate: float, dense: bool, seed: int) -> Run:
    overrides = [f"optimizer.learning_rate={rate}", f"model.dense_batch_norm={str(dense).lower()}", f"run.seed={seed}"]
    return run(f"dense-{dense}-rate-{rate}-seed-{seed}", 1, overrides, threads=1)


def _print_table(runs: dict[tuple[float, bool, int], Run]) -> None:
    print("\n| learning rate | BatchNorm on | train loss, first 50 steps | train loss, epoch 5 |", end="")
    print(" test accuracy, epoch 1 | test accuracy, epoch 5 |\n|---|---|---|---|---|---|")
    for rate, (dense, (label, _)) in product(RATES, VARIANTS.items()):
        chosen = [runs[rate, dense, seed] for seed in SEEDS]
        columns = [
            [mean(run.series("train", "loss")[:5]) for run in chosen],
            [run.series("test", "train_loss")[-1] for run in chosen],
            [run.series("test", "accuracy")[0] for run in chosen],
            [run.series("test", "accuracy")[-1] for run in chosen],
        ]
        cells = [f"{mean(values):.4f} ± {stdev(values):.4f}" for values in columns]
        print(f"| {rate} | {label} | {' | '.join(cells)} |")


def _draw(runs: dict[tuple[float, bool, int], Run]) -> None:
    figure, axes = plt.subplots(2, len(RATES), figsize=(12, 6.5), sharey="row", constrained_layout=True)
    for column, rate in enumerate(RATES):
        for (dense, (label, color)), seed in product(VARIANTS.items(), SEEDS):
            result = runs[rate, dense, seed]
            style = {"color": color, "alpha": 0.8, "label": label if seed == SEEDS[0] else None}
            axes[0, column].plot(result.series("train", "step"), result.series("train", "loss"), lw=0.8, **style)
            accuracy = result.series("test", "accuracy")
            axes[1, column].plot(range(1, len(accuracy) + 1), accuracy, marker="o", ms=3, **style)
        axes[0, column].set(title=f"learning rate {rate}", xlabel="step", yscale="log")
        axes[1, column].set(xlabel="epoch", xticks=range(1, 6), ylim=(0.66, 0.92))
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("test accuracy")
    axes[0, 0].legend(title="BatchNorm on", loc="upper right")
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "batch_norm_on_dense.png", dpi=110)


if __name__ == "__main__":
    main()
