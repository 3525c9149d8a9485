"""A distributed training job for networks with BatchNorm: MXNet Gluon over Horovod, exact for any number of ranks."""

import os
import tempfile

__version__ = "0.1.0"

# A container may run as a user whom it does not know. Whatever looks for a home then fails, before a word is said.
if os.path.expanduser("~") == "~":
    os.environ["HOME"] = os.path.join(tempfile.gettempdir(), f"home-{os.getuid()}")
