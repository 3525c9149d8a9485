"""What each ingredient of ``configs/best.yaml`` brings: ``python -m benchmarks.recipe``.

    python -m benchmarks.recipe                      the table, by held-out training samples: two hours
    python -m benchmarks.recipe --epochs 8           the same of shorter trainings: 45 minutes
    python -m benchmarks.recipe --only "no flips"    one row of it
    python -m benchmarks.recipe --test               the recipe as it is, seeds 0 to 2, by the test set: an hour

Each row is the recipe without one ingredient, trained on nine tenths of the training set and judged by the tenth that
is held out. A run that is finished is not made again. What is held out is learned on one rank a run, two runs at once:
the number of ranks changes nothing but the time. The runs of ``--test`` have 2 ranks, for theirs is told.
"""

from __future__ import annotations

import argparse
import re
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean

from benchmarks.runs import ROOT, Run, run

AT_ONCE = 2
_HELD_OUT = "data.validation_fraction=0.1"
ROWS: dict[str, list[str]] = {
    "the whole recipe": [],
    "no flips": ["data.augment.horizontal_flip=false"],
    "no shifts": ["data.augment.crop_padding=0"],
    "no erasing": ["data.augment.erase_probability=0"],
    "no label smoothing": ["train.label_smoothing=0"],
    "no weight decay": ["optimizer.weight_decay=0"],
    "constant learning rate": ["schedule.name=constant"],
    "the tutorial's network": ["model.name=tutorial", "model.options={}"],
}


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", action="store_true", help="the recipe as it is, measured on the test set")
    parser.add_argument("--only", choices=ROWS, action="append", help="this row; may be given again")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="of the runs (default: 0; --test: 0 1 2)")
    parser.add_argument("--epochs", type=int, metavar="N", help="of each training (default: the recipe's own)")
    options = parser.parse_args()
    shorter = [f"train.epochs={options.epochs}"] if options.epochs else []
    if options.test:
        runs = {seed: _run("test", shorter, seed, ranks=2) for seed in options.seeds or (0, 1, 2)}
        print("\n| seed | test accuracy | of averaged weights | minutes |\n|---|---|---|---|")
        print(
            "\n".join(
                f"| {seed} | {_cells([of_seed], 'test')} | {_minutes([of_seed])} |" for seed, of_seed in runs.items()
            )
        )
        print(f"| mean | {_cells(list(runs.values()), 'test')} | {_minutes(list(runs.values()))} |")
        return
    rows, seeds = options.only or list(ROWS), options.seeds or [0]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        held_out = {
            row: [threads.submit(_run, row, [*ROWS[row], *shorter, _HELD_OUT], seed) for seed in seeds] for row in rows
        }
    print("\n| recipe | validation accuracy | of averaged weights |\n|---|---|---|")
    for row, of_row in held_out.items():
        print(f"| {row} | {_cells([each.result() for each in of_row], 'validation')} |")


def _cells(runs: list[Run], split: str) -> str:
    means = [fmean(of.summary[f"{kind}{split}_accuracy"] for of in runs) for kind in ("", "average_")]
    return f"{means[0]:.4f} | {means[1]:.4f}"


def _minutes(runs: list[Run]) -> str:
    return f"{fmean(of.summary['train_seconds'] for of in runs) / 60:.1f}"


def _run(row: str, overrides: list[str], seed: int, ranks: int = 1) -> Run:
    epochs = [text.replace("train.epochs=", "epochs-") for text in overrides if text.startswith("train.epochs=")]
    name = "-".join(["recipe", *re.findall(r"\w+", row), *epochs, "seed", str(seed)])
    settings = ["--config", str(ROOT / "configs" / "best.yaml"), *overrides, f"run.seed={seed}"]
    return run(name, ranks, settings, threads=1)


if __name__ == "__main__":
    main()
