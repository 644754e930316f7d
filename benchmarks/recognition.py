r"""Word accuracy of PP-OCRv4 text recognition in INT8, beside other tools, on words rendered with the system's fonts.

    pip download --no-deps rapidocr-onnxruntime==1.4.4 && unzip rapidocr_onnxruntime-*.whl -d build/bench/rapidocr
    python -m benchmarks.recognition --model build/bench/rapidocr/rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx \
        --ort-python PYTHON --nncf-python PYTHON --modelopt-python PYTHON

Words come from the topics that Python's own help carries, in DejaVu, with noise, blur, tilt and uneven contrast; those scored are
not those calibrated on. A word counts if every character is right. ``cpu`` runs as a user would run it, with ONNX Runtime's
optimizations; ``gpu-*`` variants and other tools' files for GPUs are simulated node for node (optimizations off).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks import peers
from benchmarks.builds import variant
from benchmarks.fidelity import Array, Feeds, open_session
from benchmarks.tables import NOT_MEASURED, print_header, print_table, progress
from examples.pp_ocr import characters, decoded, rendered, vocabulary
from pipeline.graph.prepare import prepare

BATCH = 8
OURS = (
    ("cpu", {}),
    ("cpu", {"policy_smooth": "off", "policy_rounding": "rtn"}),
    ("gpu-int8", {}),
    ("gpu-int8", {"policy_smooth": "off", "policy_rounding": "rtn"}),
)
"""Families and the flags that differ from the defaults."""
PEERS = ("ort-static", "ort-static-tuned-symmetric", "ort-static-tuned-asymmetric", "nncf-performance", "nncf-mixed",
         "modelopt-max", "modelopt-entropy")  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the recognition network's ONNX file")
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--samples", type=int, default=64, help="words to calibrate on")
    parser.add_argument("--words", type=int, default=1000, help="words to score")
    parser.add_argument("--only", default="", help="only rows whose title holds this text")
    peers.add_arguments(parser, "ort", "nncf", "modelopt")
    given = parser.parse_args()
    bench = Bench(given.model, given.work, samples=given.samples, words=given.words)
    print_header(
        "Recognition", "benchmarks.recognition", [f"{given.words} words, calibrated on {given.samples} others"]
    )
    rows = [["FP32", *bench.figures(given.model)]]
    for family, flags in OURS:
        shown = ", ".join(f"{k.removeprefix('policy_')} {v}" for k, v in flags.items())
        title = f"ours, {family}" + (f", {shown}" if shown else "")
        if given.only in title:
            progress(title)
            made = variant(given.model, bench.data, given.work, family=family, samples=given.samples, **flags)
            rows.append([title, *bench.figures(made, optimize=family == "cpu")])
    known = peers.pythons(given)
    canonical = given.work / f"{given.model.stem}.canonical.onnx"
    if "ort" in known:
        prepare(given.model, canonical)
        onnx.save(onnx.load(canonical), canonical)  # weights inside: its tool looks for them beside its own output
    for name in PEERS:
        peer = peers.PEERS[name]
        if given.only not in peer.title:
            continue
        path: Path | str = NOT_MEASURED
        if peer.tool in known:
            # ONNX Runtime's tool stores scales for each channel in an opset that the original is too old for.
            model = canonical if peer.tool == "ort" else given.model
            path = peers.quantized(name, known[peer.tool], model, bench.data, given.samples, given.work)
        on_cpu = name in ("ort-static", "ort-static-tuned-asymmetric")
        rows.append([peer.title, *(bench.figures(path, optimize=on_cpu) if isinstance(path, Path) else [path, ""])])
    print_table(["model", "word accuracy", "output SQNR, dB"], rows)


class Bench:
    """Renders words and scores files on them.

    Args:
        model: The FP32 network.
        work: Where the calibration images are kept.
        samples: Words to calibrate on.
        words: Words to score.
    """

    def __init__(self, model: Path, work: Path, *, samples: int, words: int) -> None:
        chosen = vocabulary(samples + words)
        draw = np.random.default_rng(0)
        self.labels = chosen[:words]
        images = np.stack([rendered(word, draw) for word in chosen])
        live = open_session(model)
        self.input = live.get_inputs()[0].name
        self.characters = characters(model)
        work.mkdir(parents=True, exist_ok=True)
        self.data, self.images = work / "recognition.npz", images[:words]
        np.savez(self.data, **{self.input: images[words:]})
        self.reference = self._run(open_session(model, threads=2))

    def figures(self, path: Path, *, optimize: bool = True) -> list[str]:
        """Return word accuracy and the outputs' SQNR of one file, as text."""
        found = self._run(open_session(path, threads=2, optimize=optimize))
        right = np.mean([decoded(row, self.characters) == label for row, label in zip(found, self.labels, strict=True)])
        noise = float(np.square(found.astype(np.float64) - self.reference).sum())
        signal = float(np.square(self.reference, dtype=np.float64).sum())
        decibel = "" if noise == 0 else f"{10 * np.log10(signal / noise):.1f}"
        return [f"{right:.3f}", decibel]

    def _run(self, live: ort.InferenceSession) -> Array:
        feeds: list[Feeds] = [{self.input: self.images[i : i + BATCH]} for i in range(0, len(self.images), BATCH)]
        return np.concatenate([np.asarray(live.run(None, feed)[0], np.float32) for feed in feeds])


if __name__ == "__main__":
    main()
