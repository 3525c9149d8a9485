"""How samples reach the network: from the host's memory, or from the device's own, where a data set fits there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import mxnet as mx
import numpy as np

from job.data.dataset import FASHION_MNIST, Description, Split
from job.operators.kernels import host_view

_SHARE = 4  # of the free memory of a GPU: at most a quarter for data sets, the rest for the network
_BUFFERS = 2  # of each shape and type: one is filled while the other one is copied

Change = Callable[[np.ndarray], np.ndarray]  # of pixels, on the host


class Feed:
    """Brings samples to the network: on its device, in its type, and scaled. The same bits on each of three ways:

    On a CPU they are taken from the files, which are mapped into memory. A GPU keeps what fits: the images of a split
    are copied once, and then only the indices of a batch. All else, such as images that are changed first, is copied
    batch by batch, from memory that the GPU can read by itself.

    Args:
        ctx: the device.
        dtype: of what reaches the network.
        about: the data set.
        kept_bytes: of its memory the device may keep so many for data sets. By default a share of what a GPU has free;
            None for a CPU, which has no memory of its own. Tests give a number, and the CPU acts as a device.
    """

    def __init__(
        self, ctx: mx.Context, dtype: str, about: Description = FASHION_MNIST, kept_bytes: Optional[int] = None
    ) -> None:
        self.ctx, self.dtype, self.about = ctx, dtype, about
        if kept_bytes is None and ctx.device_type == "gpu":
            kept_bytes = mx.context.gpu_memory_info(ctx.device_id)[0] // _SHARE
        self._kept_bytes = kept_bytes or 0
        self._kept: dict[int, tuple[Split, Optional[_Kept]]] = {}  # by the identity of a split's images
        self._staging = None if kept_bytes is None else Staging(ctx)
        self._mean, self._std = (
            mx.nd.array(values, ctx, dtype).reshape((1, -1, 1, 1)) for values in (about.mean, about.std)
        )

    def __call__(
        self, split: Split, samples: Any, change: Optional[Change] = None
    ) -> tuple[mx.nd.NDArray, mx.nd.NDArray]:
        """Images (n, channels, height, width), changed and then scaled, and labels (n,) of samples of these indices.

        Args:
            split: they are of.
            samples: their indices (n,), or a slice.
            change: what is done to their pixels before; nothing by default.
        """
        kept = None if change else self._of_device(split)
        if kept is None:
            pixels = split.images[samples]
            pixels = change(pixels) if change else pixels
            labels = self.bring(np.asarray(split.labels[samples], self.dtype))
            if self._staging is None:
                return self._shifted(self._divided(pixels)), labels
            images = self.bring(pixels)
        elif isinstance(samples, slice):
            images, labels = kept.images[samples], kept.labels[samples]
        else:
            places = self.bring(np.asarray(samples, np.int32))
            images, labels = mx.nd.take(kept.images, places), mx.nd.take(kept.labels, places)
        return self._shifted(images.reshape((-1, *self.about.shape)).astype(self.dtype) / 255), labels

    def bring(self, values: np.ndarray) -> mx.nd.NDArray:
        """An array of the host as one of the device, of the same shape and type."""
        if self._staging:
            return self._staging(values)
        array = mx.nd.empty(values.shape, self.ctx, values.dtype)
        host_view(array)[...] = values
        return array

    def _divided(self, pixels: np.ndarray) -> mx.nd.NDArray:
        """On a CPU: in one pass, and at once, what MXNet's operators do in three that are queued."""
        images = mx.nd.empty((len(pixels), *self.about.shape), self.ctx, self.dtype)
        np.divide(pixels.reshape(images.shape), 255, out=host_view(images), dtype=self.dtype)
        return images

    def _shifted(self, images: mx.nd.NDArray) -> mx.nd.NDArray:
        if self.about.scales_only:
            return images
        return mx.nd.broadcast_div(mx.nd.broadcast_sub(images, self._mean), self._std)

    def _of_device(self, split: Split) -> Optional[_Kept]:
        """The split on the device, brought there at the first call; None if it does not fit."""
        key = id(split.images)
        if key not in self._kept:
            self._kept[key] = (split, self._brought(split))  # and the split, so that no other gets its identity
        return self._kept[key][1]

    def _brought(self, split: Split) -> Optional[_Kept]:
        size = getattr(split.images, "nbytes", None)  # not of pictures that are decoded when a batch needs them
        if size is None or size > self._kept_bytes or len(split.labels) >= 2**31:
            return None
        self._kept_bytes -= size
        images = mx.nd.array(split.images[:], self.ctx, np.uint8)
        return _Kept(images, mx.nd.array(split.labels, self.ctx, self.dtype))


class _Kept(NamedTuple):
    """A split on the device."""

    images: mx.nd.NDArray  # uint8, in the shape that the split has
    labels: mx.nd.NDArray  # (n,), in the network's type


class Staging:
    """Copies arrays to a GPU from pinned memory, which it reads by itself: nobody waits for the copy.

    Each shape and type has a few buffers, which are used in turn. Who fills one waits for the copy that was made of it
    before, which has long been done. Without a GPU the buffers are ordinary memory.
    """

    def __init__(self, ctx: mx.Context) -> None:
        self._ctx = ctx
        # Not cpu_pinned(0) on each rank, which would open all of them on the first GPU.
        self._host = mx.cpu_pinned(ctx.device_id) if ctx.device_type == "gpu" else mx.cpu()
        self._rings: dict[tuple[tuple[int, ...], str], deque[mx.nd.NDArray]] = {}

    def __call__(self, values: np.ndarray) -> mx.nd.NDArray:
        ring = self._rings.setdefault((values.shape, values.dtype.name), deque())
        if len(ring) < _BUFFERS:
            ring.append(mx.nd.empty(values.shape, self._host, values.dtype))
        else:
            ring.rotate()
        ring[0][:] = values
        return ring[0].copyto(self._ctx)
