"""A small CNN on scikit-learn's 8x8 handwritten digits: trained in seconds, more than 99 % right.

    pip install torch==2.13.0 && pip install '.[torch,triton,examples]'
    python examples/digits.py build/digits
    python -m pipeline build --recipe build/digits/pipeline.yaml      # from the repository's root

Written into the folder: ``calibration.npz`` and ``heldout.npz`` (``pixels`` [n, 1, 8, 8] float32 in 0 to 1),
``labels.npy`` (int64, the held-out digits in order) and ``pipeline.yaml``, whose source is :func:`cnn` in this file.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from sklearn.datasets import load_digits
from torch import nn

SEED = 0
EPOCHS = 20
BATCH = 64
HELD_OUT = 360
CALIBRATION = 256

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


class Digits(nn.Module):
    """Three convolutions with BatchNorm, global pooling and a classifier: 58,000 weights.

    ``pixels`` is [batch, 1, 8, 8] float32; the result is [batch, 10] logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(1, 32), *_block(32, 64), nn.MaxPool2d(2), *_block(64, 64), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.classifier = nn.Linear(64 * 4, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        logits: torch.Tensor = self.classifier(self.features(pixels))
        return logits


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def cnn() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return the trained network and example inputs: ``source: {module: examples.digits:cnn, trust_source: true}``."""
    pixels, _ = data()[1]
    return trained(), {"pixels": torch.from_numpy(pixels[:2])}


@functools.cache
def data() -> tuple[tuple[Floats, Labels], tuple[Floats, Labels]]:
    """Return ``(pixels, labels)`` for training and held out, shuffled with a fixed seed."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(images))
    pixels = (images[order].reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    digits = labels[order].astype(np.int64)
    return (pixels[HELD_OUT:], digits[HELD_OUT:]), (pixels[:HELD_OUT], digits[:HELD_OUT])


@functools.cache
def trained() -> Digits:
    """Train the network: the same weights on every call on one machine (one thread, fixed seed)."""
    (pixels, labels), _ = data()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Digits()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
        steps = EPOCHS * -(-len(pixels) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
        x, y = torch.from_numpy(pixels), torch.from_numpy(labels)
        for _ in range(EPOCHS):
            for chosen in torch.split(torch.randperm(len(x)), BATCH):
                loss = nn.functional.cross_entropy(model(_shifted(x[chosen])), y[chosen], label_smoothing=0.05)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
    torch.set_num_threads(threads)
    return model.eval()


def _shifted(pixels: torch.Tensor) -> torch.Tensor:
    """Return the pictures moved by up to one pixel, all of a batch by the same."""
    down, right = (int(value) for value in torch.randint(-1, 2, (2,)))
    padded = nn.functional.pad(pixels, (1, 1, 1, 1))
    return padded[..., 1 + down : 9 + down, 1 + right : 9 + right]


def accuracy() -> float:
    """Return the share of held-out digits that the network gets right."""
    pixels, labels = data()[1]
    model = trained()
    with torch.inference_mode():
        return float((model(torch.from_numpy(pixels)).argmax(1).numpy() == labels).mean())


def recipe() -> dict[str, Any]:
    """Return the recipe; its data files are beside it."""
    return {
        "name": "digits",
        "source": {"module": "examples.digits:cnn", "trust_source": True},
        "calibration": {"data": "calibration.npz", "samples": CALIBRATION},
        "policy": {"preset": "int8"},
        "targets": ["cpu"],
        "validate": {
            "data": "heldout.npz",
            "samples": HELD_OUT,
            "task": "accuracy",
            "labels": "labels.npy",
            "gates": {"task.accuracy": ">= 99% of fp32"},
        },
    }


def main(folder: Path) -> None:
    """Train the network and write data, labels and recipe into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (training, _), (heldout, labels) = data()
    np.savez(folder / "calibration.npz", pixels=training[:CALIBRATION])
    np.savez(folder / "heldout.npz", pixels=heldout)
    np.save(folder / "labels.npy", labels)
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(recipe(), sort_keys=False), encoding="utf-8")
    print(f"accuracy {accuracy():.2%} on {len(labels)} held-out digits; data and recipe: {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/digits.py DIR")
    main(Path(sys.argv[1]))
