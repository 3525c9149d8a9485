"""The networks, and BatchNorm over the global batch."""
