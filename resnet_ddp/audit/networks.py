"""Assertions on networks: counts, layers, shortcuts, initial weights, BatchNorm.

Layers are not read from a description but from a forward pass: which modules ran, on what shapes.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_ddp.architectures import ARCHITECTURES
from resnet_ddp.audit.checks import Finding, equal, none_of, within
from resnet_ddp.audit.paper import DEPTHS, PARAMETERS
from resnet_ddp.audit.subject import Subject
from resnet_ddp.models import Block, CifarNet

MAPS = {16: 32, 32: 16, 64: 8}  # channels: rows and columns of the maps
GROUP = 128  # images that BatchNorm normalises together


def count(model: nn.Module) -> int:
    """Return how many numbers a network learns."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters(subject: Subject, net: str) -> Finding:
    """Count one net's parameters."""
    return equal(PARAMETERS[DEPTHS[net]], count(subject.experiment(net).model))


def parameters_of_others(_: Subject) -> Finding:
    """Count those of the nets outside the grid; without memory for their weights."""
    expected = {"resnet32": 464_154, "resnet44": 658_586, "resnet1202": 19_421_274}
    expected["resnet20-b"] = 272_474
    with torch.device("meta"):
        return equal(
            expected, {name: count(CifarNet(ARCHITECTURES[name], 10)) for name in expected}
        )


@dataclass(frozen=True)
class Ran:
    """A module without children that ran, with its input and output."""

    module: nn.Module
    x: Tensor
    out: Tensor


def ran(subject: Subject, net: str) -> list[Ran]:
    """Return what runs when a net looks at two images, in order."""

    def make() -> list[Ran]:
        model, seen = copy.deepcopy(subject.experiment(net).model).eval(), []

        def look(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            # The ReLU after it works in place.
            seen.append(Ran(module, inputs[0].clone(), output.clone()))

        for module in model.modules():
            if not list(module.children()):
                module.register_forward_hook(look)
        with torch.no_grad():
            model(torch.linspace(-2, 2, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32))
        return seen

    return subject.once(("ran", net), make)


def convolutions(subject: Subject, net: str) -> list[Ran]:
    """Return the convolutions that ran."""
    return [one for one in ran(subject, net) if isinstance(one.module, nn.Conv2d)]


def weighted_layers(subject: Subject) -> Finding:
    """Count convolutions and linear layers, shortcuts included: option A has none."""
    layers = {
        net: sum(isinstance(one.module, nn.Conv2d | nn.Linear) for one in ran(subject, net))
        for net in DEPTHS
    }
    return equal(DEPTHS, layers)


def convolution_kind(subject: Subject) -> Finding:
    """Look for a convolution that is not 3x3 with padding 1, without bias, dense."""
    return none_of(
        [
            f"{net}: {one.module}"
            for net in DEPTHS
            for one in convolutions(subject, net)
            if isinstance(one.module, nn.Conv2d)
            and not (
                one.module.kernel_size == (3, 3)
                and one.module.padding == (1, 1)
                and one.module.dilation == (1, 1)
                and one.module.groups == 1
                and one.module.bias is None
                and one.module.padding_mode == "zeros"
            )
        ]
    )


def widths(subject: Subject) -> Finding:
    """Compare channels and maps of each convolution's output with 1 + 2n, 2n, 2n."""
    expected, actual = {}, {}
    for net, depth in DEPTHS.items():
        n = (depth - 2) // 6
        expected[net] = _runs([16] * (1 + 2 * n) + [32] * (2 * n) + [64] * (2 * n), MAPS)
        out = [one.out for one in convolutions(subject, net)]
        actual[net] = _runs([x.shape[1] for x in out], {x.shape[1]: x.shape[2] for x in out})
    return equal(expected, actual)


def _runs(channels: list[int], maps: dict[int, int]) -> str:
    return " + ".join(
        f"{channels.count(width)}x{width}@{maps[width]}" for width in dict.fromkeys(channels)
    )


def strides(subject: Subject) -> Finding:
    """Find which convolutions halve the map: the first of the second and third stage."""
    expected = {net: [2 + (d - 2) // 3, 2 + 2 * (d - 2) // 3] for net, d in DEPTHS.items()}
    actual = {
        net: [
            place
            for place, one in enumerate(convolutions(subject, net), start=1)
            if one.x.shape[2] != one.out.shape[2]
        ]
        for net in DEPTHS
    }
    return equal(expected, actual)


def layer_order(subject: Subject) -> Finding:
    """Look for a convolution without BatchNorm right after, or with an input that has no ReLU."""
    offenders = []
    for net in DEPTHS:
        layers = [one for one in ran(subject, net) if not isinstance(one.module, nn.Identity)]
        place = 0
        for one, following in zip(layers, [*layers[1:], layers[-1]], strict=True):
            if not isinstance(one.module, nn.Conv2d):
                continue
            place += 1
            is_normalised = isinstance(following.module, nn.BatchNorm2d) and torch.equal(
                following.x, one.out
            )
            if not is_normalised:
                offenders.append(f"{net}: no BatchNorm after convolution {place}")
            if place > 1 and one.x.min() < 0:
                offenders.append(f"{net}: no ReLU before convolution {place}")
    return none_of(offenders)


def network_end(subject: Subject) -> Finding:
    """Look for a net that does not end in global average pooling and a linear layer to 10."""
    offenders = []
    for net in DEPTHS:
        model = copy.deepcopy(subject.experiment(net).model).eval()
        seen: list[Tensor] = []
        hook = model.blocks[-1].register_forward_hook(lambda *a, seen=seen: seen.append(a[2]))
        with torch.no_grad():
            logits = model(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32))
            hook.remove()
            expected = F.linear(seen[0].mean((2, 3)), model.linear.weight, model.linear.bias)
        if logits.shape != (1, 10) or not torch.allclose(logits, expected, rtol=1e-4, atol=1e-5):
            offenders.append(net)
    return none_of(offenders)


def shortcuts(subject: Subject) -> Finding:
    """Silence each residual block's own branch and see what its shortcut lets through.

    Every second pixel, the new channels zero and last, added before the last ReLU.
    """
    offenders = []
    for net in ("resnet20", "resnet56", "resnet110"):
        for place, x, out in _silenced(subject, net, bias=-0.25):
            channels, size = out.shape[1], out.shape[2]
            expected = torch.full((1, channels, size, size), -0.25)
            step = x.shape[2] // size
            for channel in range(x.shape[1]):
                expected[0, channel] += x[0, channel, ::step, ::step]
            if not torch.equal(out, expected.clamp_min(0)):
                offenders.append(f"{net}: block {place}")
    return none_of(offenders)


def no_shortcuts(subject: Subject) -> Finding:
    """Silence each plain block and see that nothing of its input comes through."""
    offenders = [
        f"{net}: block {place}"
        for net in ("plain20", "plain56")
        for place, _, out in _silenced(subject, net, bias=0.25)
        if not torch.equal(out, torch.full_like(out, 0.25))
    ]
    return none_of(offenders)


def _silenced(subject: Subject, net: str, *, bias: float) -> list[tuple[int, Tensor, Tensor]]:
    """Return each block's number, input and output when its convolutions always give `bias`."""
    results = []
    for place, block in enumerate(subject.experiment(net).model.blocks, start=1):
        assert isinstance(block, Block)
        block = copy.deepcopy(block).eval()
        nn.init.zeros_(block.bn2.weight)
        nn.init.constant_(block.bn2.bias, bias)
        channels = block.conv1.in_channels
        size = MAPS[channels]
        # Whole numbers of both signs, another at each place.
        x = torch.arange(float(channels * size * size)).view(1, channels, size, size) % 1009 - 500
        with torch.no_grad():
            results.append((place, x, block(x.clone())))
    return results


def initial_convolutions(subject: Subject) -> Finding:
    """Compare each layer's deviation with sqrt(2 / fan_out), in standard errors."""
    worst = 0.0
    for net in DEPTHS:
        for one in convolutions(subject, net):
            weight = one.module.weight
            assert isinstance(weight, Tensor)
            z = weight.detach().flatten() * math.sqrt(9 * weight.shape[0] / 2)
            worst = max(worst, abs(float(z.std()) - 1) * math.sqrt(2 * len(z)))
    return Finding("at most 5 standard errors off", f"{worst:.2f}", worst <= 5)


def initial_shape(subject: Subject) -> Finding:
    """Compare the share of weights beyond two deviations with the normal distribution's."""
    weights = [one.module.weight for one in convolutions(subject, "resnet56")]
    z = torch.cat(
        [w.detach().flatten() / w.detach().std() for w in weights if isinstance(w, Tensor)]
    )
    return within(0.0455, float((z.abs() > 2).float().mean()), 0.002)


def initial_linear(subject: Subject) -> Finding:
    """Look at bounds and deviation of the last layers: uniform in +-1/sqrt(64)."""
    layers = [subject.experiment(net).model.linear for net in DEPTHS]
    weight = torch.cat([layer.weight.detach().flatten() for layer in layers])
    bias = torch.cat([layer.bias.detach() for layer in layers])
    largest, deviation = float(weight.abs().max()), float(weight.std())
    passed = 0.123 < largest <= 0.125 and abs(deviation - 0.0722) < 0.003
    passed = passed and 0.05 < float(bias.abs().max()) <= 0.125
    return Finding(
        "largest 0.125, std 0.0722", f"largest {largest:.3f}, std {deviation:.4f}", passed
    )


def initial_batchnorm(subject: Subject) -> Finding:
    """Collect the initial scale, shift, running mean and variance of all BatchNorms."""
    found = set()
    for module in _batchnorms(subject):
        state = module.state_dict()
        names = ("weight", "bias", "running_mean", "running_var")
        found |= {(name, value) for name in names for value in state[name].tolist()}
    expected = {("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)}
    return equal(_by_name(expected), _by_name(found))


def _by_name(found: set[tuple[str, float]]) -> list[str]:
    few = sorted(found)[:8]
    return [f"{name} {value:g}" for name, value in few]


def initial_seeds(subject: Subject) -> Finding:
    """Compare the first weights of five seeds, and of one seed built twice."""
    seeds = [subject.experiment("resnet20", seed) for seed in range(5)]
    again = subject.build("resnet20", 0, 1)
    firsts = [experiment.model.conv.weight.detach() for experiment in [*seeds, again]]
    return equal(5, len({tuple(first.flatten().tolist()) for first in firsts}))


def _batchnorms(subject: Subject) -> list[nn.BatchNorm2d]:
    return [
        module
        for net in DEPTHS
        for module in subject.experiment(net).model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]


def batchnorm_constants(subject: Subject) -> Finding:
    """Collect the constants of all BatchNorms."""
    found = {
        f"eps {module.eps:g}, momentum {module.momentum:g}"
        for module in _batchnorms(subject)
        if module.momentum is not None and module.affine and module.track_running_stats
    }
    return equal(["eps 1e-05, momentum 0.1"], sorted(found))


def _normalised(subject: Subject, scale: float) -> tuple[nn.BatchNorm2d, Tensor, Tensor]:
    """Return a BatchNorm after one training batch, the batch, and what came out.

    One pixel an image: the two ways to count a variance differ by 1 in 128. The second half of the
    batch has another mean, so that halves normalised apart come out differently.
    """
    module = copy.deepcopy(subject.experiment().model.bn).train()
    place = torch.arange(GROUP * 16.0).view(GROUP, 16, 1, 1)
    x = scale * (1 + (3.7 * place).sin() + (place >= GROUP * 8))
    with torch.no_grad():
        return module, x, module(x.clone())


def batchnorm_batch(subject: Subject) -> Finding:
    """Compare with (x - mean) / sqrt(variance + 1e-5) over all 128, the variance biased."""
    # Values so small that 1e-5 counts.
    _, x, out = _normalised(subject, 0.01)
    x = x.double()
    mean = x.mean(0, keepdim=True)
    expected = (x - mean) / (x - mean).square().mean(0, keepdim=True).add(1e-5).sqrt()
    return within(0, float((out - expected).abs().max()), 1e-4)


def batchnorm_running(subject: Subject) -> Finding:
    """Compare with 0.9 of the old and 0.1 of the new, the variance unbiased."""
    module, x, _ = _normalised(subject, 1.0)
    x = x.double()[:, :, 0, 0]
    mean, variance = 0.1 * x.mean(0), 0.9 + 0.1 * (x - x.mean(0)).square().sum(0) / (GROUP - 1)
    assert module.running_mean is not None and module.running_var is not None
    off = max(
        float((module.running_mean - mean).abs().max()),
        float((module.running_var - variance).abs().max()),
    )
    return within(0, off, 1e-5)
