"""Records as a run writes them: of training, of an evaluation, and the summary."""

from __future__ import annotations

from typing import Any

MEASURED = ("images_per_second", "pace")  # by a clock: what two runs that learn the same do not have alike

CONFUSION = [[8, 2] + [0] * 8, [0, 5] + [0] * 8] + [[0] * 10 for _ in range(7)] + [[5] + [0] * 8 + [0]]
TRAIN: dict[str, Any] = {
    "step": 10,
    "epoch": 0,
    "split": "train",
    "loss": 0.68604,
    "accuracy": 0.739,
    "learning_rate": 0.2,
    "images_per_second": 21000.4,
    "gradient_norm": 1.5,
    "update_ratio": 0.01,
    "pace": {
        "step_seconds_p50": 0.06,
        "step_seconds_p99": 0.09,
        "compute_seconds": [0.04, 0.055],
        "wait_seconds": [0.02, 0.005],
        "images_per_second": [3200.0, 2327.3],
        "rss_bytes": [400_000_000, 390_000_000],
    },
    "ranks": 2,
}
TEST: dict[str, Any] = {
    "step": 235,
    "epoch": 0,
    "split": "test",
    "loss": 0.5,
    "accuracy": 0.837,
    "examples": 10_000,
    "train_loss": 0.25,
    "train_accuracy": 0.9,
    "confusion": CONFUSION,
    "mistakes": [{"image": 3, "true": 0, "predicted": 1, "loss": 4.5}],
    "ranks": 2,
}
SUMMARY: dict[str, Any] = {
    "test_accuracy": 0.83704,
    "test_loss": 0.5,
    "best_test_accuracy": 0.85,
    "best_step": 100,
    "steps": 235,
    "images_per_second": 21000.4,
    "train_seconds": 92.4,
    "ranks": 2,
    "shards": 8,
    "weights_sha256": "0123456789abcdef" * 4,
}
