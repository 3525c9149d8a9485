"""The networks, their training graph, and BatchNorm over the global batch as a layer."""
