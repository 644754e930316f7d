r"""A build's INT8 engine and its FP32 model on a real tritonserver: throughput and latency under load, side by side.

    python -m benchmarks.serving build/minilm --server-env .venv-triton

Both are served at once by one server with the same batching, and asked in turns. Clients are threads that send the next request
when the answer is there; a request is one sample of the build's kept shapes.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.tables import print_header, print_table, progress
from pipeline import model as models
from pipeline.recipe import DynamicBatching, TritonConfig
from pipeline.serving import serving
from pipeline.triton.repository import write_repository
from pipeline.triton.served import onnx_model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="a build directory with a cpu engine")
    parser.add_argument("--server-env", type=Path, default=Path(".venv-triton"))
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a request")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each model; the median of them is shown")
    given = parser.parse_args()
    config = TritonConfig(max_batch_size=16, dynamic_batching=DynamicBatching(max_queue_delay_us=2000))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, file in (("fp32", "model.fp32.onnx"), ("int8", "engines/cpu/model.onnx")):
            write_repository(Path(folder), model=onnx_model(given.build / file, name=name), config=config)
        inputs = models.inputs(models.load(given.build / "model.fp32.onnx"))
        feed = {i.name: np.ones((1, given.tokens), i.dtype) for i in inputs}
        print_header(
            "Serving", "benchmarks.serving", [f"requests of {given.tokens} tokens, {given.seconds:g} s a turn"]
        )
        with serving(Path(folder), environment=given.server_env) as server:
            for name in ("fp32", "int8"):
                _load(server.grpc_url, name, feed, clients=2, seconds=2)
            for clients in given.clients:
                turns: dict[str, list[tuple[float, list[float]]]] = {"fp32": [], "int8": []}
                for turn in range(given.rounds):
                    for name, found in turns.items():
                        progress(f"{clients} clients, turn {turn + 1}: {name}")
                        found.append(_load(server.grpc_url, name, feed, clients=clients, seconds=given.seconds))
                rates = {name: float(np.median([rate for rate, _ in found])) for name, found in turns.items()}
                for name, found in turns.items():
                    times = np.concatenate([t for _, t in found]) * 1e3
                    quantiles = [f"{np.percentile(times, q):.1f}" for q in (50, 95, 99)]
                    ratio = f"{rates[name] / rates['fp32']:.2f}x"
                    rows.append([str(clients), name.upper(), f"{rates[name]:.1f}", ratio, *quantiles])
    print_table(["clients", "model", "requests/s", "over FP32", "p50, ms", "p95, ms", "p99, ms"], rows)


def _load(
    url: str, name: str, feed: dict[str, np.ndarray], *, clients: int, seconds: float
) -> tuple[float, list[float]]:
    """Return requests a second and every request's seconds."""
    import tritonclient.grpc as grpc

    times: list[float] = []
    lock = threading.Lock()
    end = time.perf_counter() + seconds

    def run() -> None:
        client = grpc.InferenceServerClient(url)
        inputs = []
        for key, array in feed.items():
            inputs.append(grpc.InferInput(key, list(array.shape), "INT64" if array.dtype == np.int64 else "FP32"))
            inputs[-1].set_data_from_numpy(array)
        mine = []
        while (start := time.perf_counter()) < end:
            client.infer(name, inputs)
            mine.append(time.perf_counter() - start)
        client.close()
        with lock:
            times.extend(mine)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(times) / seconds, times


if __name__ == "__main__":
    main()
