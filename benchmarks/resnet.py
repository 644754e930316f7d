"""ResNet-50 (He et al., "Deep Residual Learning", 2015, table 1) as torch modules, for :mod:`benchmarks.models`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
"""Width, blocks and stride of each stage."""
EXPANSION = 4


class ConvNorm(nn.Module):
    """A convolution and its batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[batch, outputs, height, width]``."""
        return self.norm(self.conv(x))  # type: ignore[no-any-return]

    def fold(self) -> None:
        """Fold the batch norm into the convolution."""
        assert isinstance(self.norm, nn.BatchNorm2d)
        self.conv = fuse_conv_bn_eval(self.conv, self.norm)
        self.norm = nn.Identity()


class Bottleneck(nn.Module):
    """Three convolutions and a skip connection."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * EXPANSION
        self.reduce = ConvNorm(inputs, width, 1)
        self.middle = ConvNorm(width, width, 3, stride)
        self.expand = ConvNorm(width, outputs, 1)
        self.skip = nn.Identity() if stride == 1 and inputs == outputs else ConvNorm(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[batch, 4 * width, height, width]``."""
        y = torch.relu(self.middle(torch.relu(self.reduce(x))))
        return torch.relu(self.expand(y) + self.skip(x))


class ResNet50(nn.Module):
    """The network, randomly initialized; images ``[batch, 3, 224, 224]`` to logits ``[batch, 1000]``."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 64, 7, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks, channels = [], 64
        for width, count, stride in STAGES:
            for index in range(count):
                blocks.append(Bottleneck(channels, width, stride if index == 0 else 1))
                channels = width * EXPANSION
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        features = self.body(self.pool(torch.relu(self.stem(x))))
        pooled = nn.functional.adaptive_avg_pool2d(features, 1).flatten(1)
        return self.head(pooled)  # type: ignore[no-any-return]

    def learn_statistics(self, images: torch.Tensor) -> None:
        """Set the batch norms' statistics from data, so that random weights keep activations in a sane range."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        self.train()
        with torch.no_grad():
            for batch in torch.split(images, 32):
                self(batch)

    def fold(self) -> ResNet50:
        """Return the network with every batch norm folded into its convolution, in inference mode."""
        self.eval()
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        return self
