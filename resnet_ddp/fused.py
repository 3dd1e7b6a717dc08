"""On a CPU: convolution, BatchNorm, the addition of the shortcut and ReLU as one layer, in chains.

`fuse(model)` returns the same network, parameters and names of `CifarNet` kept, whose training
steps go through our `kernels`. It is the mathematics of `batchnorm`, whose groups and exchange of
sums serve here too. Gains:

- Eager PyTorch passes over each map nine times where three suffice: the statistics are taken of an
  image that is still in the cache, and the gradient between BatchNorm and convolution is never
  written down.
- In fp32 channels-last maps become possible: torch's BatchNorm adds those up one number after the
  other, and loses digits.
- In bf16 weight gradients are not rounded to bf16.
- Layers in a row are one call each way, on maps that are kept from step to step: what Python and
  autograd take for a layer was a tenth of a step, in one thread, while the others waited.

Shapes: b images of this process, C channels, H rows, W columns, G groups in the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_ddp import kernels as our_kernels
from resnet_ddp.augment import Draws, Normalisation, crop_and_flip
from resnet_ddp.batchnorm import GroupBatchNorm2d, Groups
from resnet_ddp.compilation import compile_checked
from resnet_ddp.kernels import CHANNELS, Kernels, Layer
from resnet_ddp.models import Block, CifarNet, IdentityShortcut, build_model

INPUT = -1  # the place of what goes into a chain


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


@dataclass(frozen=True)
class Link:
    """A layer of a chain: relu(bn(conv(x)) + residual), where x is the output of the one before.

    Attributes:
        residual: the place in the chain of the layer whose output is added, INPUT, or None.
        stride: 2 adds every second pixel of it, and nothing to the second half of the channels
            (option A).
    """

    conv: nn.Conv2d
    bn: nn.BatchNorm2d
    residual: int | None = None
    stride: int = 1

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """The convolution's weight, BatchNorm's weight and bias."""
        return self.conv.weight, self.bn.weight, self.bn.bias


class Chain:
    """Layers in a row, run by one call each way; several where processes exchange their sums."""

    def __init__(self, kernels: Kernels, links: Sequence[Link]) -> None:
        self.kernels, self.links = kernels, tuple(links)
        self._maps: _Maps | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the last layer's output twice, for the next layer and for a shortcut.

        Two outputs of the same memory, so that backward is given the two gradients apart and adds
        them while it reads them. The running statistics are updated.

        Args:
            x: (b, C, H, W).
            residual: what is added where a link's residual is INPUT.
        """
        parameters = [parameter for link in self.links for parameter in link.parameters]
        outs: tuple[Tensor, Tensor] = _Run.apply(  # type: ignore[no-untyped-call]
            self, x, residual, *parameters
        )
        return outs

    def maps(self, x: Tensor) -> _Maps:
        """Return those for inputs such as x: the last ones, as long as it stays alike."""
        if self._maps is None or not self._maps.fit(x):
            self._maps = _Maps(self.kernels, self.links, x)
        return self._maps


class _Run(torch.autograd.Function):
    """A chain, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, chain: Chain, x: Tensor, residual: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = _compute_type(parameters[0])
        if residual is not None:
            residual = _channels_last(residual, dtype)
        x = _channels_last(x, dtype)
        ctx.maps = chain.maps(x)
        out = ctx.maps.forward(x, residual)
        ctx.save_for_backward(x, *parameters)  # to be watched for changes
        ctx.count = ctx.maps.count
        ctx.set_materialize_grads(False)
        return out, out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        maps: _Maps = ctx.maps
        _ = ctx.saved_tensors  # raises if one was changed
        if ctx.count != maps.count:
            raise RuntimeError("these maps were overwritten: backward must follow its own forward")
        present = [_channels_last(grad, maps.dtype) for grad in grads if grad is not None]
        grad_x, grad_residual, parameters = maps.backward(present, needs_x=ctx.needs_input_grad[1])
        return None, grad_x, grad_residual, *parameters


class _Maps:
    """The maps of a chain's layers and the calls that fill them.

    Their memory is the same in every step and held between steps: for ResNet-110 and 128 images
    0.5 GB in bf16. Only the output is new each time. What belongs to a graph is kept detached, or
    the graph, which holds these maps, would hold itself.

    Attributes:
        count: how often forward was run; backward finds the maps of the last time.
    """

    def __init__(self, kernels: Kernels, links: Sequence[Link], x: Tensor) -> None:
        self.kernels, self.links, self.dtype = kernels, links, x.dtype
        self.groups = _groups(links[0].bn, len(x))
        assert len(x) == self.groups.share.stop - self.groups.share.start
        self.count = 0
        self.layers = (Layer * len(links))()
        self.xs, self.ys = [x.detach()], []  # the last of xs is the output
        self.affine, self.sums = [], []
        self.residual: Tensor | None = None
        images, channels, height, width = x.shape
        for link, layer in zip(links, self.layers, strict=True):
            layer.convolves = kernels.has_convolution(link.conv, self.xs[-1].shape, self.dtype)
            layer.ci, layer.co, layer.size = channels, len(link.conv.weight), height
            assert layer.co in CHANNELS  # the kernels would leave others undone in silence
            layer.stride, _ = link.conv.stride
            assert height % layer.stride == width % layer.stride == 0
            channels, height, width = layer.co, height // layer.stride, width // layer.stride
            layer.pixels, layer.width = height * width, width
            layer.images, layer.first = images, self.groups.share.start
            layer.groups, layer.group_size = self.groups.num_groups, self.groups.group_size
            layer.eps, layer.momentum = link.bn.eps, link.bn.momentum
            y = torch.empty(images, height, width, channels, dtype=self.dtype).permute(0, 3, 1, 2)
            self.ys.append(y)
            self.xs.append(torch.empty_like(y))
            self.affine.append(torch.empty(3, layer.groups, channels))
            # The sums of y and of its square, 1 / deviation, two sums of gradients.
            self.sums.append(torch.zeros(5, layer.groups, channels, dtype=torch.float64))
        self.is_one_call = not self.groups.is_distributed and all(
            layer.convolves for layer in self.layers
        )
        self._connect()

    def _connect(self) -> None:
        """Tell the layers where everything lies that stays there.

        The gradients of maps take turns in two places each, which stay in the cache.
        """
        largest = max(each.numel() for each in (*self.xs, *self.ys))
        self.gradients = torch.empty(4, largest, dtype=self.dtype)
        towards_x, masked = cycle(self.gradients[:2]), cycle(self.gradients[2:])
        for place, (link, layer) in enumerate(zip(self.links, self.layers, strict=True)):
            layer.x, layer.y = self.xs[place].data_ptr(), self.ys[place].data_ptr()
            layer.out = self.xs[place + 1].data_ptr()
            sums = self.sums[place]
            layer.affine, layer.sums = self.affine[place].data_ptr(), sums.data_ptr()
            layer.invstd, layer.grad_sums = sums[2].data_ptr(), sums[3].data_ptr()
            layer.grad_x = next(towards_x).data_ptr()
            if place:
                self.layers[place - 1].grad1 = layer.grad_x
            layer.residual_stride = layer.grad2_stride = 1
            if link.residual is not None and link.residual != INPUT:
                source = self.layers[link.residual]
                assert layer.co == link.stride * source.co
                layer.residual, layer.residual_stride = source.out, link.stride
                source.grad2 = layer.masked = next(masked).data_ptr()
                source.grad2_stride = link.stride

    def fit(self, x: Tensor) -> bool:
        """Whether they are for maps of this shape and type."""
        return x.shape == self.xs[0].shape and x.dtype == self.dtype

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Fill the maps, and return the output, which is new each time."""
        self.count += 1
        self.xs[0] = x.detach()
        self.residual = None if residual is None else residual.detach()
        out = torch.empty_like(self.xs[-1])
        self.xs[-1] = out.detach()
        self.layers[0].x, self.layers[-1].out = x.data_ptr(), out.data_ptr()
        for link, layer in zip(self.links, self.layers, strict=True):
            assert link.conv.weight.is_contiguous(memory_format=torch.channels_last)
            layer.weight, layer.bn_weight, layer.bn_bias = (p.data_ptr() for p in link.parameters)
            layer.running_mean, layer.running_var, layer.num_batches_tracked = (
                buffer.data_ptr() for buffer in link.bn.buffers()
            )
            if link.residual == INPUT:
                assert residual is not None
                layer.residual = residual.data_ptr()
        if self.is_one_call:
            self.kernels.call("forward", self.layers, self.dtype)
        else:
            self._forward_apart()
        return out

    def backward(
        self, grads: Sequence[Tensor], *, needs_x: bool
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        """Return the gradients of x, of the residual and of the parameters.

        Args:
            grads: one or two of the output, to be added up.
        """
        first, last = self.layers[0], self.layers[-1]
        last.grad1, *more = (grad.data_ptr() for grad in grads)
        last.grad2 = more[0] if more else None
        if self.links[-1].residual is None:
            masked = torch.empty_like(self.ys[-1]) if more else None
            last.masked = None if masked is None else masked.data_ptr()
        grad_x = torch.empty_like(self.xs[0])
        first.grad_x = grad_x.data_ptr()
        grad_residual = None if self.residual is None else torch.empty_like(self.residual)
        parameters = []
        for link, layer in zip(self.links, self.layers, strict=True):
            parameters += (of_layer := [torch.empty_like(p) for p in link.parameters])
            layer.weight_grad, layer.bn_weight_grad, layer.bn_bias_grad = (
                grad.data_ptr() for grad in of_layer
            )
            if link.residual == INPUT:
                assert grad_residual is not None
                layer.masked = grad_residual.data_ptr()
        if self.is_one_call:
            self.kernels.call("backward", self.layers, self.dtype)
            return grad_x, grad_residual, parameters
        return self._backward_apart(grad_x, parameters, needs_x=needs_x), grad_residual, parameters

    def _forward_apart(self) -> None:
        """Go layer by layer, and exchange sums within each; PyTorch convolves where we do not."""
        for place, (link, layer) in enumerate(zip(self.links, self.layers, strict=True)):
            if not layer.convolves:
                conv, weight = link.conv, link.conv.weight.to(self.dtype)
                y = F.conv2d(self.xs[place], weight, None, conv.stride, conv.padding)
                self.ys[place] = _channels_last(y, self.dtype)
                layer.y = self.ys[place].data_ptr()
            sums = self.sums[place][:2].zero_()  # those of groups that are all in other processes
            self.kernels.call("forward_sums", layer, self.dtype)
            self.groups.sum_over_processes(sums)
            self.kernels.call("forward_rest", layer, self.dtype)

    def _backward_apart(
        self, grad_x: Tensor, parameters: list[Tensor], *, needs_x: bool
    ) -> Tensor | None:
        """Go back layer by layer; return the gradient of x: grad_x, unless PyTorch finds it."""
        of_x: Tensor | None = None
        for place in reversed(range(len(self.links))):
            layer, sums = self.layers[place], self.sums[place][3:].zero_()
            of_y = None if layer.convolves else torch.empty_like(self.ys[place])
            if of_y is not None:
                layer.grad_x = of_y.data_ptr()
            self.kernels.call("backward_sums", layer, self.dtype)
            self.groups.sum_over_processes(sums)
            self.kernels.call("backward_rest", layer, self.dtype)
            if of_y is None:
                of_x = grad_x
                continue
            of_x, parameters[3 * place] = _convolution_back(
                self.links[place].conv, of_y, self.xs[place], needs_x=place > 0 or needs_x
            )
            if place:
                assert of_x is not None
                of_x = _channels_last(of_x, self.dtype)  # the layer below reads it
                self.layers[place - 1].grad1 = of_x.data_ptr()
        return of_x


def _convolution_back(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, *, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Return PyTorch's gradients of x and the weight."""
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        *(grad, x, conv.weight.to(x.dtype), None, conv.stride, conv.padding, conv.dilation),
        *(False, (0, 0), 1, (needs_x, True, False)),
    )
    return grad_x, grad_weight.to(conv.weight.dtype)


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


class FusedNet(CifarNet):
    """`CifarNet`, whose training steps go through chains."""

    chains: list[tuple[nn.Module | None, Chain]]

    def forward(self, images: Tensor) -> Tensor:
        """Map images (b, 3, 32, 32) to logits (b, K)."""
        if not self.bn.training:
            return super().forward(images)
        x, for_shortcut = images, None
        for shortcut, chain in self.chains:
            residual = None if shortcut is None else shortcut(for_shortcut)
            x, for_shortcut = chain(x, residual)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def fuse(model: CifarNet, kernels: Kernels) -> FusedNet:
    """Return the network through the kernels, with the model's own parameters and buffers."""
    our_kernels.keep_freed_memory()
    fused: FusedNet = object.__new__(FusedNet)
    nn.Module.__init__(fused)
    for name, child in model.named_children():
        fused.add_module(name, child)
    fused.chains = [(shortcut, Chain(kernels, links)) for shortcut, links in _chains(model)]
    return fused


def _chains(model: CifarNet) -> list[tuple[nn.Module | None, list[Link]]]:
    """Return the model's layers in as few chains as may be, each with what makes its residual.

    The first convolution is PyTorch's, and so are shortcuts other than the identity.
    """
    chains: list[tuple[nn.Module | None, list[Link]]] = [(None, [Link(model.conv, model.bn)])]
    for number, block in enumerate(cast(Iterable[Block], model.blocks.children())):
        shortcut, residual, stride = block.shortcut, None, 1
        is_ours = type(shortcut) in (type(None), nn.Identity, IdentityShortcut)
        if number == 0 or not is_ours:
            chains.append((shortcut, []))
            residual = None if shortcut is None else INPUT
        elif shortcut is not None:
            residual = len(chains[-1][1]) - 1
            stride, _ = block.conv1.stride
        links = chains[-1][1]
        links += [
            Link(block.conv1, block.bn1),
            Link(block.conv2, block.bn2, residual, stride),
        ]
    return chains
