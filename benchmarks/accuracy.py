"""What INT8 costs MiniLM in accuracy: every calibrator, on both kinds of target, beside other tools.

    python -m benchmarks.accuracy --models build/bench/models --work build/bench/work \
        --ort-python PYTHON --nncf-python PYTHON --modelopt-python PYTHON

SQNR and cosine are those of the last hidden state against FP32 on held-out sentences, padding left out. Pearson is the
correlation of the cosines of mean-pooled embeddings with people's judgements of 1,225 pairs of news articles (Lee50),
each cut at the model's 128 tokens. Both come from the same file, run by ONNX Runtime with its optimizations on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import yaml

from benchmarks import peers
from benchmarks.builds import size_bytes, variant
from benchmarks.fidelity import compare, int8_share, load, outputs
from benchmarks.tables import NOT_MEASURED, print_header, print_table, progress
from engines.onnxruntime import OnnxRuntimeRunner
from pipeline.recipe import Method, Validation
from pipeline.validation.tasks import open_task

SAMPLES = 64
FAMILIES = {"cpu": "uint8, asymmetric", "gpu-int8": "int8, symmetric"}
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("build/bench/models"))
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration samples")
    peers.add_arguments(parser, "ort", "nncf", "modelopt")
    given = parser.parse_args()
    model, data = given.models / "minilm.onnx", given.models / "minilm_calib.npz"
    bench = Bench(model, given.models / "minilm_eval.npz", given.work / "text")
    print_header("Accuracy", "benchmarks.accuracy", [f"calibrated on {given.samples} samples"])
    rows = [["FP32", "", f"{size_bytes(model) / 1e6:.1f}", "", "", "", f"{bench.pearson(model):.4f}"]]
    for family, types in FAMILIES.items():
        for method in Method:
            progress(f"{family}: {method}")
            path = variant(
                model, data, given.work, family=family, samples=given.samples, calibration_method=str(method)
            )
            rows.append([f"ours, {method}", f"{family}: {types}", *bench.figures(path)])
    path = variant(model, data, given.work, samples=given.samples, policy_activations="dynamic")
    rows.append(["ours, dynamic", "cpu: uint8, asymmetric", *bench.figures(path)])
    known = peers.pythons(given)
    for name, peer in peers.PEERS.items():
        python = known.get(peer.tool)
        made: Path | str = NOT_MEASURED
        if python is not None:
            made = peers.quantized(name, python, model, data, given.samples, given.work)
        rows.append([peer.title, "", *(bench.figures(made) if isinstance(made, Path) else [str(made)])])
    columns = ["model", "activations", "size, MB", "held-out SQNR, dB", "cosine", "GEMM FLOPs in INT8", "Lee50 Pearson"]
    print_table(columns, [[*row, *[""] * (len(columns) - len(row))] for row in rows])


class Bench:
    """Compares files with one FP32 model.

    Args:
        model: The FP32 model.
        heldout: ``.npz`` with samples that nobody calibrated on.
        texts: Where the labelled pairs are kept.
    """

    def __init__(self, model: Path, heldout: Path, texts: Path) -> None:
        self.data = load(heldout)
        self.reference = outputs(model, self.data)
        if not (texts / "pairs.jsonl").exists():
            command = [sys.executable, str(ROOT / "examples" / "minilm.py"), str(texts)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        self.pairs = texts / "pairs.jsonl"
        # The recipe that the example writes beside the pairs names the folder with the tokenizer.
        source = yaml.safe_load((texts / "pipeline.yaml").read_text(encoding="utf-8"))["source"]
        self.tokenizer = Path(source["huggingface"])

    def figures(self, path: Path) -> list[str]:
        """Return size, SQNR, cosine, INT8 share and Pearson of one file, as text."""
        found = compare(self.reference, outputs(path, self.data))
        return [
            f"{size_bytes(path) / 1e6:.1f}",
            f"{found.sqnr_db:.2f}",
            f"{found.cosine:.4f}",
            f"{int8_share(path, self.data):.1%}",
            f"{self.pearson(path):.4f}",
        ]

    def pearson(self, path: Path) -> float:
        """Return the correlation of embedding cosines with human judgement."""
        config = Validation(task="embedding-similarity", labels=str(self.pairs), tokenizer=self.tokenizer)
        with OnnxRuntimeRunner(path, threads=2) as runner:
            task = open_task(config, runner.inputs)
            assert task is not None
            # The task brings its own texts; the data argument is for tasks that have none.
            scores = task.score(runner, None)  # type: ignore[arg-type]
        found = scores["pearson"]
        if found is None:
            raise SystemExit(f"{path}: all embeddings are the same, or not finite")
        return found


if __name__ == "__main__":
    main()
