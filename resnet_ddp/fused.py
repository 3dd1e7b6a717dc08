"""On a CPU: convolution, BatchNorm, the addition of the shortcut and ReLU as one layer.

`fuse(model)` returns the same network, parameters and names of `CifarNet` kept, whose training
steps go through our `kernels`. It is the mathematics of `batchnorm`, whose groups and exchange of
sums serve here too. Gains:

- Eager PyTorch passes over each map nine times where three suffice: the statistics are taken of an
  image that is still in the cache, and the gradient between BatchNorm and convolution is never
  written down.
- In fp32 channels-last maps become possible: torch's BatchNorm adds those up one number after the
  other, and loses digits.
- In bf16 weight gradients are not rounded to bf16.

Shapes: b images of this process, C channels, H rows, W columns, G groups in the global batch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_ddp import kernels as our_kernels
from resnet_ddp.augment import Draws, Normalisation, crop_and_flip
from resnet_ddp.batchnorm import GroupBatchNorm2d, Groups
from resnet_ddp.compilation import compile_checked
from resnet_ddp.kernels import Kernels, Layer
from resnet_ddp.models import Block, CifarNet, build_model


def load() -> Kernels | None:
    """Return the kernels, tried when they are compiled; None where they cannot be had."""
    return our_kernels.load(trouble_with)


def trouble_with(kernels: Kernels) -> str:
    """Say what is wrong with a step through the kernels, "" if nothing is."""
    for precision in ("fp32", "bf16"):
        model = build_model("resnet20", num_classes=10, seed=0)
        _, trouble = compile_checked(
            model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            num_images=16,
            num_classes=10,
            precision=precision,
            layout=torch.channels_last,
            compile=lambda model: fuse(cast(CifarNet, model), kernels),
        )
        if trouble:
            return f"{precision}: {trouble}"
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (64, 32, 32, 3), generator=generator, dtype=torch.uint8)
    dy, dx, flip = (torch.randint(high, (64,), generator=generator) for high in (9, 9, 2))
    draws, normalise = Draws(dy, dx, flip), Normalisation.pixel_mean(pixels)
    which = torch.arange(64).flip(0)
    expected = crop_and_flip(normalise(pixels[which]), draws, padding=4)
    if not torch.equal(kernels.augment(pixels, which, draws, normalise, padding=4), expected):
        return "crops differ"
    return ""


class _Layer(torch.autograd.Function):
    """relu(BatchNorm(convolution(x)) + residual), twice: for the next layer and for the shortcut.

    Two outputs of the same memory, so that backward is given the two gradients apart and adds them
    while it reads them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bn_weight: Tensor,
        bn_bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x = _channels_last(x, _compute_type(weight))
        assert weight.is_contiguous(memory_format=torch.channels_last)
        (stride, _), (images, in_channels, height, width) = conv.stride, x.shape
        channels, height, width = len(weight), height // stride, width // stride
        convolves = kernels.has_convolution(conv, x)
        if convolves:
            shape = (images, channels, height, width)
            y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        else:
            y = F.conv2d(x, weight.to(x.dtype), None, conv.stride, conv.padding)
            y = _channels_last(y, x.dtype)
        if residual is not None:
            residual = _channels_last(residual, x.dtype)
        out = torch.empty_like(y)
        groups = _groups(bn, images)
        affine = torch.empty(3, groups.num_groups, channels)
        # The sums of y and of its square, then 1 / deviation; zeros for groups of other processes.
        wide = torch.zeros(3, groups.num_groups, channels, dtype=torch.float64)
        layer = Layer(
            ci=in_channels,
            co=channels,
            stride=stride,
            size=x.shape[2],
            images=images,
            first=groups.share.start,
            groups=groups.num_groups,
            group_size=groups.group_size,
            pixels=height * width,
            convolves=convolves,
            eps=bn.eps,
            momentum=bn.momentum,
            weight=weight.data_ptr(),
            bn_weight=bn_weight.data_ptr(),
            bn_bias=bn_bias.data_ptr(),
            running_mean=_address(bn.running_mean),
            running_var=_address(bn.running_var),
            x=x.data_ptr(),
            residual=_address(residual),
            y=y.data_ptr(),
            out=out.data_ptr(),
            affine=affine.data_ptr(),
            sums=wide.data_ptr(),
            invstd=wide[2].data_ptr(),
        )
        kernels.call("forward_sums", layer, x.dtype)
        groups.sum_over_processes(wide[:2])
        kernels.call("forward_rest", layer, x.dtype)
        # The next convolution keeps the output anyway; without a residual y tells the mask.
        ctx.save_for_backward(x, weight, y, None if residual is None else out, affine, wide)
        ctx.kernels, ctx.conv, ctx.groups, ctx.layer = kernels, conv, groups, layer
        ctx.set_materialize_grads(False)
        return out, out.view_as(out)

    @staticmethod
    def backward(
        ctx: Any, grad1: Tensor | None, grad2: Tensor | None
    ) -> tuple[None, None, None, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
        x, weight, y, out, _, _ = ctx.saved_tensors
        kernels: Kernels = ctx.kernels
        groups: Groups = ctx.groups
        layer: Layer = ctx.layer
        grads = [_channels_last(grad, y.dtype) for grad in (grad1, grad2) if grad is not None]
        masked = None if out is None and len(grads) == 1 else torch.empty_like(y)
        sums = torch.zeros(2, groups.num_groups, y.shape[1], dtype=torch.float64)
        grad_bn_weight, grad_bn_bias = torch.empty(2, y.shape[1])
        grad_x = torch.empty_like(x if layer.convolves else y)
        grad_weight = torch.empty_like(weight)
        layer.grad1 = grads[0].data_ptr()
        layer.grad2 = grads[1].data_ptr() if len(grads) == 2 else None
        layer.masked = _address(masked)
        layer.grad_sums = sums.data_ptr()
        layer.bn_weight_grad = grad_bn_weight.data_ptr()
        layer.bn_bias_grad = grad_bn_bias.data_ptr()
        layer.grad_x = grad_x.data_ptr()
        layer.weight_grad = grad_weight.data_ptr()
        kernels.call("backward_sums", layer, y.dtype)  # this process's gradients; DDP adds others'
        groups.sum_over_processes(sums)
        kernels.call("backward_rest", layer, y.dtype)
        if not layer.convolves:
            grad_x, grad_weight = _convolution_back(
                ctx.conv, grad_x, x, weight, needs_x=ctx.needs_input_grad[3]
            )
        grad_residual = masked if ctx.needs_input_grad[4] else None
        return None, None, None, grad_x, grad_residual, grad_weight, grad_bn_weight, grad_bn_bias


def _convolution_back(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor, *, needs_x: bool
) -> tuple[Tensor, Tensor]:
    """Return PyTorch's gradients of x and weight."""
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        *(grad, x, weight.to(x.dtype), None, conv.stride, conv.padding, conv.dilation),
        *(False, (0, 0), 1, (needs_x, True, False)),
    )
    return grad_x, grad_weight.to(weight.dtype)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _compute_type(weight: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return weight.dtype


def _groups(bn: nn.BatchNorm2d, num_images: int) -> Groups:
    if isinstance(bn, GroupBatchNorm2d):
        return bn.groups
    return Groups(num_images, num_images, slice(0, num_images), is_distributed=False)


def layer(
    kernels: Kernels,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    x: Tensor,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return relu(bn(conv(x)) + residual), twice, and update the running statistics in training."""
    if not bn.training:
        out = bn(conv(x))
        out = F.relu(out if residual is None else out + residual)
        return out, out
    assert bn.num_batches_tracked is not None
    with torch.no_grad():
        bn.num_batches_tracked.add_(1)
    outs: tuple[Tensor, Tensor] = _Layer.apply(  # type: ignore[no-untyped-call]
        kernels, conv, bn, x, residual, conv.weight, bn.weight, bn.bias
    )
    return outs


class FusedBlock(Block):
    """A block that takes and gives the pair of outputs of `layer`."""

    kernels: Kernels

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Two of (b, C, H, W) -> two of (b, C', H / stride, W / stride)."""
        x, for_shortcut = pair
        out, _ = layer(self.kernels, self.conv1, self.bn1, x)
        residual = None if self.shortcut is None else self.shortcut(for_shortcut)
        return layer(self.kernels, self.conv2, self.bn2, out, residual)


class FusedNet(CifarNet):
    """`CifarNet` of fused blocks."""

    kernels: Kernels

    def forward(self, images: Tensor) -> Tensor:
        """Map images (b, 3, 32, 32) to logits (b, K)."""
        pair = layer(self.kernels, self.conv, self.bn, images)
        x, _ = self.blocks(pair)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def fuse(model: CifarNet, kernels: Kernels) -> FusedNet:
    """Return the network through the kernels, with the model's own parameters and buffers."""
    our_kernels.keep_freed_memory()
    fused: FusedNet = _as(FusedNet, model, kernels)
    fused.blocks = nn.Sequential(
        *(_as(FusedBlock, block, kernels) for block in model.blocks.children())
    )
    return fused


def _as(cls: type[Any], module: nn.Module, kernels: Kernels) -> Any:
    """Return a module of the class with the module's children; the kernels are no child."""
    result: Any = object.__new__(cls)
    nn.Module.__init__(result)
    for name, child in module.named_children():
        result.add_module(name, child)
    if not hasattr(result, "shortcut") and isinstance(module, Block):
        result.shortcut = None
    result.kernels = kernels
    return result
