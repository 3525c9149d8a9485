"""A distributed training job for networks with BatchNorm: MXNet Gluon over Horovod, exact for any number of ranks."""

__version__ = "0.1.0"
