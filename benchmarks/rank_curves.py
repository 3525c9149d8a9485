"""Does the number of ranks change what is learned? ``python -m benchmarks.rank_curves``, about 10 minutes on two cores.

The same global batch of 16 on 1, 2, 3 and 4 ranks, that is 16 to 4 samples a rank, with BatchNorm on the dense layer
too, where so few samples make poor statistics: once with SyncBatchNorm, once with a shard a rank whose BatchNorm has
its own statistics. Prints a table and draws docs/images/rank_curves.png.
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.runs import IMAGES, Run, run

STEPS = 800
WINDOW = 20
RANKS = (1, 2, 3, 4)
SETTINGS = [
    f"train.max_steps={STEPS}",
    "train.log_every_steps=1",
    "data.global_batch=16",
    "optimizer.learning_rate=0.05",
    "model.dense_batch_norm=true",
]


def main() -> None:
    """Run what is missing, print, and draw."""
    runs = {(sync, ranks): _run(sync, ranks) for sync in (True, False) for ranks in RANKS}
    columns = (
        "BatchNorm",
        "ranks",
        "samples a rank",
        "largest difference of a step's loss",
        "test accuracy",
        "weights",
    )
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for (sync, ranks), result in runs.items():
        reference = np.array(runs[sync, 1].series("train", "loss"))
        difference = np.abs(np.array(result.series("train", "loss")) / reference - 1).max()
        name = "synchronized" if sync else "of each rank"
        share = f"{16 // ranks}" if 16 % ranks == 0 else f"{16 // ranks} or {16 // ranks + 1}"
        accuracy, digest = result.records[-1]["accuracy"], result.summary["weights_sha256"][:12]
        print(f"| {name} | {ranks} | {share} | {difference:.1e} | {accuracy:.4f} | `{digest}` |")
    _draw(runs)


def _run(sync: bool, ranks: int) -> Run:
    name = f"curves-{'sync' if sync else 'local'}-{ranks}-ranks"
    return run(name, ranks, [*SETTINGS, *([] if sync else ["model.sync_batch_norm=false", "data.shards=1"])])


def _draw(runs: dict[tuple[bool, int], Run]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True, constrained_layout=True)
    for axis, sync, title in zip(axes, (True, False), ("SyncBatchNorm", "BatchNorm of each rank on its own")):
        for ranks, width in zip(RANKS, (6.0, 4.2, 2.6, 1.0)):
            loss = np.convolve(runs[sync, ranks].series("train", "loss"), np.ones(WINDOW) / WINDOW, mode="valid")
            steps = np.arange(WINDOW, WINDOW + len(loss))
            label = f"{ranks} rank{'s' * (ranks > 1)}: weights {runs[sync, ranks].summary['weights_sha256'][:12]}"
            axis.plot(steps, loss, lw=width if sync else 1.2, label=label)
        axis.set(title=title, xlabel="step", yscale="log")
        axis.legend(prop={"family": "monospace", "size": 8})
    axes[0].set_ylabel(f"training loss, mean of {WINDOW} steps")
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "rank_curves.png", dpi=110)


if __name__ == "__main__":
    main()
