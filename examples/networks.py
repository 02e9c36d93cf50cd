"""Networks of Izmailov et al. 2018, for images of 32×32 pixels: VGG-16, PreResNet, ResNet, WRN.

Each function returns an untrained network, so that ckptavg can name one by its file:

    --model examples/networks.py:vgg16_bn --model-arg classes=100
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

# Channels of VGG-16's convolutions, in the five groups between its poolings.
VGG16_GROUPS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)


class VGG(nn.Module):
    """VGG-16 (Simonyan & Zisserman 2015) with the small classifier that 32×32 images need.

    Args:
        classes: Number of classes.
        batch_norm: Put BatchNorm behind each convolution.
    """

    def __init__(self, classes: int, *, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for group in VGG16_GROUPS:
            for width in group:
                layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(512, 512), nn.ReLU(),
            nn.Dropout(), nn.Linear(512, 512), nn.ReLU(),
            nn.Linear(512, classes),
        )  # fmt: skip
        _initialize_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, 3, 32, 32)."""
        return self.classifier(self.features(images).flatten(1))  # type: ignore[no-any-return]


class PreActivation(nn.Module):
    """Residual block with BatchNorm and ReLU before each convolution (He et al. 2016).

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        kernels: Kernel size of each convolution.
        widths: Channels behind each convolution; the last is ``outputs``.
        stride: Stride of the first 3×3 convolution.
        dropout: Probability of dropout before the last convolution.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernels: tuple[int, ...],
        widths: tuple[int, ...],
        stride: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList()
        self.convolutions = nn.ModuleList()
        channels, strided = inputs, kernels.index(3)
        for i, (kernel, width) in enumerate(zip(kernels, widths, strict=True)):
            step = stride if i == strided else 1
            self.norms.append(nn.BatchNorm2d(channels))
            self.convolutions.append(
                nn.Conv2d(channels, width, kernel, step, padding=kernel // 2, bias=False)
            )
            channels = width
        self.dropout = nn.Dropout(dropout)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the shortcut and the convolutions."""
        out, last = x, len(self.norms) - 1
        for i, (norm, convolution) in enumerate(zip(self.norms, self.convolutions, strict=True)):
            out = F.relu(norm(out))
            if i == last:
                out = self.dropout(out)
            out = convolution(out)
        return out + self.shortcut(x)  # type: ignore[no-any-return]


class PreResNet(nn.Module):
    """Residual network of three stages with pre-activation: PreResNet and Wide ResNet.

    Args:
        classes: Number of classes.
        blocks: Residual blocks per stage.
        width: Channels of the first stage; each stage doubles them.
        bottleneck: Blocks of three convolutions, around the narrow one a 1×1 on each side.
        dropout: Probability of dropout before a block's last convolution.
    """

    def __init__(
        self, classes: int, blocks: int, width: int = 16, *, bottleneck: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        channels = 16
        for stage in range(3):
            narrow = width * 2**stage
            outputs = 4 * narrow if bottleneck else narrow
            kernels = (1, 3, 1) if bottleneck else (3, 3)
            widths = (narrow, narrow, outputs) if bottleneck else (outputs, outputs)
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(PreActivation(channels, outputs, kernels, widths, stride, dropout))
                channels = outputs
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)
        _initialize_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, 3, H, W)."""
        features = F.relu(self.norm(self.blocks(self.stem(images))))
        return self.classifier(features.mean((2, 3)))  # type: ignore[no-any-return]


class Basic(nn.Module):
    """Residual block of ResNet-18: two convolutions, BatchNorm behind each."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution_with_norm(inputs, outputs, 3, stride)
        self.second = _convolution_with_norm(outputs, outputs, 3, 1)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = _convolution_with_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activated sum of the shortcut and the convolutions."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2015) whose stem keeps the resolution of small images."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = _convolution_with_norm(3, 64, 3, 1)
        layers: list[nn.Module] = []
        channels = 64
        for stage, outputs in enumerate((64, 128, 256, 512)):
            layers.append(Basic(channels, outputs, stride=2 if stage > 0 else 1))
            layers.append(Basic(outputs, outputs, stride=1))
            channels = outputs
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)
        _initialize_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, 3, H, W)."""
        features = self.blocks(F.relu(self.stem(images)))
        return self.classifier(features.mean((2, 3)))  # type: ignore[no-any-return]


def _convolution_with_norm(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


@torch.no_grad()
def _initialize_convolutions(network: nn.Module) -> None:
    """Draw convolutions from a normal distribution by fan-out (He et al. 2015)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            module.weight.normal_(0, math.sqrt(2 / fan_out))
            if module.bias is not None:
                module.bias.zero_()


def vgg16(classes: int = 10) -> VGG:
    """Return VGG-16 without BatchNorm, the paper's."""
    return VGG(classes, batch_norm=False)


def vgg16_bn(classes: int = 10) -> VGG:
    """Return VGG-16 with BatchNorm."""
    return VGG(classes, batch_norm=True)


def preresnet8(classes: int = 10) -> PreResNet:
    """Return the smallest PreResNet: one block of two convolutions per stage."""
    return PreResNet(classes, blocks=1, bottleneck=False)


def preresnet20(classes: int = 10) -> PreResNet:
    """Return PreResNet-20: blocks of two convolutions."""
    return PreResNet(classes, blocks=3, bottleneck=False)


def preresnet110(classes: int = 10) -> PreResNet:
    """Return PreResNet-110: bottleneck blocks, as in the paper's code for 44 layers or more."""
    return PreResNet(classes, blocks=12, bottleneck=True)


def preresnet164(classes: int = 10) -> PreResNet:
    """Return PreResNet-164, the paper's ResNet-164."""
    return PreResNet(classes, blocks=18, bottleneck=True)


def resnet18(classes: int = 10) -> ResNet18:
    """Return ResNet-18."""
    return ResNet18(classes)


def wrn28_10(classes: int = 10) -> PreResNet:
    """Return WRN-28-10 (Zagoruyko & Komodakis 2016)."""
    return PreResNet(classes, blocks=4, width=160, bottleneck=False)
