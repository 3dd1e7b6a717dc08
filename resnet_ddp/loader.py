"""The second data path: FFCV's Loader over the same file, in our order, for data of any size.

FFCV (https://ffcv.io) maps the file, and a thread of its own copies the images of the next few
batches into a ring of buffers. Order and augmentation stay ours: the Loader is handed this rank's
image numbers, whatever pass they belong to, and yields uint8, which `Batches` crops, flips and
normalises on the device as always. So a batch has the bits it has on the resident path.

What FFCV 1.0.2 does to whoever uses it as it is, and what is done about it here:

- An error in its thread leaves the consumer waiting for ever: `Epoch.run` reports it.
- What it yields are views of buffers that it writes again later: they are copied at once.
- It drops an incomplete last batch: every batch has the same size, and none is last.
- A thread that is not needed any more goes on waiting: `Epoch.stop` ends it.
- It sets torch's number of threads, for all threads to come: it is put back.
- It keeps Python sets of pages for each sample, some 600 bytes of them, for a cache that is not
  used here: `LeanManager` does without.
- Without a seed it draws one from NumPy's global generator: it gets one.

Importing this module imports ffcv.

Shapes: b images of this rank.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
from numpy.typing import NDArray
from torch import Tensor

from resnet_ddp.batches import Batches, ImagesInFile
from resnet_ddp.beton import MappedImages
from resnet_ddp.exits import UserError

# Iterations that FFCV is told of at a time; it makes an object of each.
SEGMENT: Final = 4096


class LeanManager(OSCacheManager):  # type: ignore[misc]
    """What the Loader needs to find images in a mapped file, and no more."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        # An empty allocation of another field may share its offset with the image behind it.
        table = reader.alloc_table[reader.alloc_table["size"] > 0]
        order = np.argsort(table["ptr"])
        self.ptrs = table["ptr"][order]
        self.sizes = table["size"][order]
        self.context = OSCacheContext(self)


class Epoch(EpochIterator):  # type: ignore[misc]
    """An iteration of FFCV's that says why it ended, and ends when it is told to.

    Args:
        order: the image numbers, batch after batch.

    Attributes:
        error: what went wrong in the thread, if anything did.
    """

    error: BaseException | None = None

    def __init__(self, loader: Loader, order: NDArray[np.int64]) -> None:
        self.torch_threads = torch.get_num_threads()
        super().__init__(loader, order)

    def run(self) -> None:
        """Be the thread."""
        try:
            super().run()
        except BaseException as error:
            self.error = error
            self.output_queue.put(None)

    def run_pipeline(self, number: int, *rest: Any) -> Any:
        """Load a batch."""
        # The thread has just set what every thread of torch's that is yet to come would take.
        torch.set_num_threads(self.torch_threads)
        return super().run_pipeline(number, *rest)

    def stop(self) -> None:
        """End the thread, whatever it is waiting for."""
        self.iter_ixes = iter(())
        self.terminate_event.set()
        while self.is_alive():
            with suppress(queue.Empty):
                self.output_queue.get(timeout=0.05)
        self.close()


class LoadedBatches(Batches):
    """`Batches` whose images come from their file through FFCV's Loader.

    They are loaded ahead, in order: after a batch the next is at hand, any other has to be sought.

    Args:
        images: in a file, whose labels are taken as well.
        num_workers: threads of FFCV's; one copies a million images a second.
        arguments: see `Batches`.
    """

    def __init__(self, *arguments: Any, num_workers: int = 1, **named: Any) -> None:
        super().__init__(*arguments, **named)
        assert isinstance(self.images, ImagesInFile)
        batch_size = self.share.stop - self.share.start
        self._file = self.images.images
        self._loader = make_loader(self._file, batch_size, num_workers)
        self._all = torch.arange(batch_size, device=self.labels.device)
        self._next = self._end = 0  # iterations: the one at hand, and that after the last told of
        self._epochs: list[Epoch] = []  # one at the most
        self._finalizer = weakref.finalize(self, _stop, self._epochs)

    def __call__(self, iteration: int | Tensor) -> tuple[Tensor, Tensor]:
        """Return images (b, 3, 32, 32) and labels (b,) int64.

        Args:
            iteration: a number; or a tensor as for `Batches`, which is not looked at: it has to be
                the one after the last, or the one that was sought.
        """
        if not isinstance(iteration, Tensor) and iteration != self._next:
            self.seek(iteration)
        return super().__call__(iteration)

    def seek(self, iteration: int) -> None:
        """Go on at another iteration than the one after the last."""
        self.close()
        self._next = self._end = iteration

    def close(self) -> None:
        """End the thread; the next batch would start another."""
        _stop(self._epochs)
        self._end = self._next

    def load(self, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next batch, which is that of these image numbers: images, 0..b-1, labels."""
        if self._next == self._end:
            self._start()
        try:
            loaded = dict(zip(self._loader.pipeline_specs, next(self._epochs[0]), strict=True))
        except StopIteration:
            error = self._epochs[0].error
            self.close()
            raise UserError(
                f"FFCV's Loader failed at iteration {self._next}, {type(error).__name__}: {error}\n"
                "Mend that, or go on with --data-path resident: the bits are the same."
            ) from error
        self._next += 1
        pixels, labels = (
            # A copy by NumPy: torch would wake its threads for it.
            torch.from_numpy(loaded[field].copy()).to(self.labels.device)
            for field in (self._file.image_field, self._file.label_field)
        )
        return pixels, self._all, labels[:, 0]

    def _start(self) -> None:
        _stop(self._epochs)
        self._end = min(self._next + SEGMENT, len(self.order))
        order = self.order[self._next : self._end, self.share].cpu().numpy()
        self._epochs.append(Epoch(self._loader, order.flatten().astype(np.int64)))


def make_loader(images: MappedImages, batch_size: int, num_workers: int) -> Loader:
    """Return a Loader that yields images (b, H, W, 3) uint8 and labels (b, 1) int64."""
    pipelines: dict[str, Any] = dict.fromkeys(images.fields)  # none for what else there is
    pipelines |= {
        images.image_field: [SimpleRGBImageDecoder()],
        images.label_field: [IntDecoder()],
    }
    with _torch_threads_kept(), mock.patch.object(loader, "OSCacheManager", LeanManager):
        made = Loader(
            str(images.path),
            batch_size,
            num_workers=num_workers,
            os_cache=True,
            seed=0,
            indices=[],  # each iteration brings its own
            pipelines=pipelines,
            drop_last=False,
        )
    return made


def _stop(epochs: list[Epoch]) -> None:
    while epochs:
        epochs.pop().stop()


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
