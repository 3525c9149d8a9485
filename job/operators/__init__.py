"""The operators of our own: BatchNorm over the global batch, convolutions, and the loops that compute them."""
