"""What a run shows of itself: console, records, TensorBoard, profile, report."""
