"""The same network and the same global batch, trained by others: each file as its library's own examples would.

``benchmarks/compare.py`` starts them. They know nothing of this project but :mod:`benchmarks.peers.turns`.
"""
