"""The CPU's own kernels: compiled from kernels.cpp by the machine's compiler, and called.

Done at first use, in seconds, and kept in the user's cache.

Shapes: b images of this process, C channels, H rows, W columns, G groups in the global batch.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from resnet_ddp.augment import Draws, Normalisation

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast"),
    *("-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-fopenmp", "-shared", "-fPIC"),
)
CHANNELS = (16, 32, 64)  # of `models.WIDTHS`
COMPILING = "compiling-"  # how the folders are called in which it is done
FORGOTTEN = 3600.0  # seconds after which such a folder is nobody's
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# mallopt's, of glibc: memory below the first is taken from the heap, and kept up to the second.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1


class Layer(ctypes.Structure):
    """The arguments of the kernels: relu(BatchNorm(convolution(x)) + residual), both directions.

    kernels.cpp says what they are. The tensors pointed to must outlive the calls.
    """

    _fields_ = (
        *((name, ctypes.c_int) for name in ("ci", "co", "stride", "size")),
        *((name, ctypes.c_int) for name in ("images", "first", "groups", "group_size")),
        *((name, ctypes.c_int) for name in ("pixels", "width", "convolves")),
        *((name, ctypes.c_int) for name in ("residual_stride", "grad2_stride")),
        *((name, ctypes.c_double) for name in ("eps", "momentum")),
        *((name, ctypes.c_void_p) for name in ("weight", "bn_weight", "bn_bias")),
        *((name, ctypes.c_void_p) for name in ("running_mean", "running_var")),
        ("num_batches_tracked", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "y", "out")),
        *((name, ctypes.c_void_p) for name in ("affine", "sums", "invstd", "grad_sums")),
        *((name, ctypes.c_void_p) for name in ("grad1", "grad2", "masked", "grad_x")),
        *((name, ctypes.c_void_p) for name in ("weight_grad", "bn_weight_grad", "bn_bias_grad")),
    )


class Crops(ctypes.Structure):
    """The arguments of the augmentation; kernels.cpp says what they are."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("count", "height", "width", "padding")),
        *((name, ctypes.c_void_p) for name in ("images", "which", "dy", "dx", "flip")),
        *((name, ctypes.c_void_p) for name in ("mean", "scale", "out")),
    )


@dataclass(frozen=True)
class Kernels:
    """The compiled functions.

    Maps (b, C, H, W) and weights lie in channels-last; C and C' are of `CHANNELS`.
    """

    library: ctypes.CDLL
    name: str

    def call(self, part: str, layers: ctypes.Array[Layer] | Layer, dtype: torch.dtype) -> None:
        """Run a chain "forward" or "backward", or a part of that for one layer.

        Each direction of a layer is in two parts, "_sums" and "_rest"; between them processes
        exchange their sums.

        Args:
            dtype: of the maps; float32 or bfloat16.
        """
        run = getattr(self.library, f"{part}_{NAMES[dtype]}")
        if isinstance(layers, Layer):
            run(ctypes.byref(layers), _threads())
        else:
            run(layers, len(layers), _threads())

    def augment(
        self, images: Tensor, which: Tensor, draws: Draws, normalise: Normalisation, padding: int
    ) -> Tensor:
        """Return crop_and_flip(normalise(images[which]), draws, padding), bit for bit, in one pass.

        Args:
            images: (N, H, W, 3) uint8.
            which: (b,) int64.
        """
        num_images, height, width, channels = images.shape
        assert channels == 3 and images.dtype == torch.uint8 and images.is_contiguous()
        assert int(which.min()) >= 0 and int(which.max()) < num_images
        assert max(int(draws.dy.max()), int(draws.dx.max())) <= 2 * padding
        mean = normalise.mean.expand(height, width, 3).contiguous()
        scale = normalise.scale.expand(width, 3).contiguous()
        out = torch.empty(len(which), height, width, 3)
        crops = Crops(
            count=len(which),
            height=height,
            width=width,
            padding=padding,
            images=images.data_ptr(),
            which=which.data_ptr(),
            dy=draws.dy.data_ptr(),
            dx=draws.dx.data_ptr(),
            flip=draws.flip.data_ptr(),
            mean=mean.data_ptr(),
            scale=scale.data_ptr(),
            out=out.data_ptr(),
        )
        self.library.crop_images(ctypes.byref(crops))
        return out

    def has_convolution(self, conv: nn.Conv2d, x_shape: torch.Size, dtype: torch.dtype) -> bool:
        """Whether this convolution is done too, and faster than by PyTorch."""
        _, _, height, width = x_shape
        return (
            conv.kernel_size == (3, 3)
            and conv.in_channels in CHANNELS
            and conv.out_channels in CHANNELS
            and height == width
            and height % (8 * conv.stride[0]) == 0
            and bool(getattr(self.library, f"has_convolutions_{NAMES[dtype]}")())
        )


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


def load(trouble_with: Callable[[Kernels], str]) -> Kernels | None:
    """Return the kernels, compiled if they are not in the cache; None where they cannot be had.

    The cache's key is the source, the flags and the processor: a home directory may be shared by
    machines.

    Args:
        trouble_with: tries them before they are put there, and says what is wrong, or "".
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    cpu = subprocess.run(
        [compiler, "-march=native", "-Q", "--help=target"], capture_output=True, check=False
    ).stdout
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode() + cpu).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "resnet_ddp"
    path = cache / f"kernels-{key}.so"
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(cache)
            # Several processes may compile at once.
            with tempfile.TemporaryDirectory(dir=cache, prefix=COMPILING) as folder:
                target = Path(folder) / path.name
                command = [compiler, *FLAGS, str(SOURCE), "-o", str(target)]
                subprocess.run(command, check=True, capture_output=True)
                if trouble := trouble_with(Kernels(ctypes.CDLL(str(target)), path.stem)):
                    print(f"warning: training without our kernels: {trouble}", file=sys.stderr)
                    return None
                target.replace(path)
        return Kernels(ctypes.CDLL(str(path)), path.stem)
    except (OSError, subprocess.CalledProcessError):
        return None


def keep_freed_memory() -> None:
    """Have maps of the next step take the memory of this one's, which is not paged in anew."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def _remove_leftovers(cache: Path) -> None:
    """Remove what processes left that were killed while they compiled."""
    for folder in cache.glob(f"{COMPILING}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > FORGOTTEN:
                shutil.rmtree(folder)
