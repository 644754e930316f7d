"""A build as a model of lm-evaluation-harness; importing this module registers it under the name ``enginewright``.

What runs is ONNX Runtime on the CPU: the ``cpu`` engine as it is served, and for a GPU target its Q/DQ graph in simulation.
Texts are decoded greedily, with the key-value cache where the model has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibrators.data.tokenizer import TextTokenizer, load_tokenizer
from engines.onnxruntime import OnnxRuntimeRunner
from pipeline import kv_cache
from pipeline.errors import DataError, MissingError, RecipeError
from pipeline.policy.plan import PrecisionPlan
from pipeline.report.contract import Report
from pipeline.stages.run import CANONICAL, stored_recipe
from pipeline.types import Array, Feeds
from pipeline.validation.decoding import IDS, MASK, POSITIONS, TYPES, Decoder
from pipeline.validation.language import log_sum_exp

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MissingError(
        "Evaluating with lm-evaluation-harness needs the package lm_eval.",
        where="lm-evaluation-harness",
        fix="pip install '.[lm-eval]'",
    ) from error

__all__ = ["EnginewrightLM", "cli_evaluate"]

FP32 = "fp32"
"""As ``target``: the build's canonical FP32 model."""

Scored = tuple[Any, list[int], list[int]]
"""What the harness asks for, the context's tokens, the continuation's tokens."""


@register_model("enginewright")
class EnginewrightLM(TemplateLM):  # type: ignore[misc]
    """One model of a build directory, or an ONNX file with its tokenizer.

    Args:
        build: A build directory.
        target: One of its targets, or ``fp32``.
        onnx: A causal language model instead of a build; then ``tokenizer`` is needed.
        tokenizer: Folder or ``tokenizer.json``; the build's own if not given.
        max_length: Tokens that the model reads at once; longer contexts lose their beginning.
        max_gen_toks: Most tokens to generate where a task does not say.
        batch_size: Sequences scored at once; generation takes one at a time.
        threads: For ONNX Runtime; 0 is one per core.
        device: Taken because the harness gives it; everything runs on the CPU.
        max_batch_size: Likewise.

    Raises:
        PipelineError: There is no such build, target or tokenizer, or the model is no causal language model.
    """

    def __init__(
        self,
        build: str | None = None,
        target: str = "cpu",
        *,
        onnx: str | None = None,
        tokenizer: str | None = None,
        max_length: int = 2048,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        threads: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        path, optimize = _model(build, target, onnx)
        self._runner = OnnxRuntimeRunner(path, threads=threads, optimize=optimize)
        self._decoder = Decoder(self._runner)
        self._text = _tokenizer(build, tokenizer, max_length)
        self._max_length, self._max_gen_toks = max_length, max_gen_toks
        self._batch = int(batch_size) if str(batch_size).isdigit() else 1
        if self._text.eos_id is None:
            raise DataError(
                "The tokenizer names no eos token, which stands before a text without context and ends a generated one.",
                where=str(self._text.files[0]),
                fix="Name an eos_token in tokenizer_config.json.",
            )

    @property
    def eot_token_id(self) -> int:
        """Return the id of the end of a text."""
        assert self._text.eos_id is not None
        return self._text.eos_id

    @property
    def max_length(self) -> int:
        """Return how many tokens the model reads at once."""
        return self._max_length

    @property
    def tokenizer_name(self) -> str:
        """Return what the harness keeps results under."""
        return self._text.files[0].parent.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return a text's token ids, with special tokens only if asked for."""
        if add_special_tokens:
            return [int(i) for i in self._text.encode(string)[0]]
        (ids,) = self._text.tokens([string])
        return [int(i) for i in ids]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log likelihood of whole texts, in windows of ``max_length`` that do not overlap."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length,
                context_len=1,
            )
            scored: list[Scored] = [(None, *make_disjoint_window(pair)) for pair in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(scored)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy continuation of each context, up to the first of its stop texts.

        Raises:
            RecipeError: A task asks for sampling.
        """
        found = []
        for request in requests:
            context, given = request.args
            found.append(self._generate(context, dict(given)))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _generate(self, context: str, given: dict[str, Any]) -> str:
        if given.get("do_sample") and float(given.get("temperature") or 0.0) > 0:
            raise RecipeError(
                "The task asks for sampling; builds are decoded greedily.",
                where="generation_kwargs",
                fix="Set do_sample: false and temperature: 0.",
            )
        until = [given["until"]] if isinstance(given.get("until"), str) else list(given.get("until") or ())
        count = int(given.get("max_gen_toks") or given.get("max_new_tokens") or self._max_gen_toks)
        ids = self.tok_encode(context)[-max(self._max_length - count, 1) :] or [self.prefix_token_id]
        self._decoder.reset()
        made: list[int] = []
        text, logits = "", self._decoder.feed(ids)
        for _ in range(count):
            token = int(logits[-1].argmax())
            if token == self.eot_token_id:
                break
            made.append(token)
            text = self._text.decode(made)
            if any(stop in text for stop in until):
                break
            logits = self._decoder.feed([token])
        ends = [text.index(stop) for stop in until if stop and stop in text]
        return text[: min(ends)] if ends else text

    def _loglikelihood_tokens(self, requests: list[Scored], **options: Any) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        for start in range(0, len(requests), self._batch):
            group = requests[start : start + self._batch]
            found += self._scored([(context, wanted) for _, context, wanted in group])
            for (asked, _, _), answer in zip(group, found[start:], strict=True):
                if asked is not None:
                    self.cache_hook.add_partial("loglikelihood", asked, answer)
        return found

    def _scored(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return (log likelihood in nats, whether greedy decoding gives it) of each continuation."""
        # The last token predicts nothing that is asked for.
        rows = [(context + wanted)[-(self._max_length + 1) :][:-1] for context, wanted in pairs]
        logits = self._logits(rows)
        answers = []
        for (_, wanted), row, values in zip(pairs, rows, logits, strict=True):
            asked = np.asarray(wanted[-len(row) :], np.int64)
            before = values[len(row) - len(asked) : len(row)].astype(np.float64)
            likelihoods = before[np.arange(len(asked)), asked] - log_sum_exp(before)
            answers.append((float(likelihoods.sum()), bool(np.array_equal(before.argmax(-1), asked))))
        return answers

    def _logits(self, rows: list[list[int]]) -> Array:
        """Return ``[batch, tokens, vocabulary]`` for rows of token ids, padded at the end, where no token sees it."""
        width = max(map(len, rows))
        ids, mask = np.full((len(rows), width), self.eot_token_id, np.int64), np.zeros((len(rows), width), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        positions = np.broadcast_to(np.arange(width), ids.shape)
        made: Feeds = {IDS: ids, MASK: mask, POSITIONS: positions, TYPES: np.zeros_like(ids)}
        feeds = {
            i.name: kv_cache.empty(i, len(rows))
            if kv_cache.is_past(i.name)
            else np.ascontiguousarray(made[i.name]).astype(i.dtype)
            for i in self._runner.inputs
        }
        return self._runner.infer(feeds)["logits"]


def _model(build: str | None, target: str, onnx: str | None) -> tuple[Path, bool]:
    """Return the ONNX file to run and whether ONNX Runtime may optimize it, as it does where it is the engine."""
    if (build is None) == (onnx is None):
        raise RecipeError("Name one model.", where="model_args", fix="Give build=DIR (and target=NAME), or onnx=FILE.")
    if onnx is not None:
        return Path(onnx), True
    folder = Path(build or "")
    if target == FP32:
        return folder / CANONICAL, True
    report = folder / "report.json"
    if not report.is_file():
        raise RecipeError("The folder holds no finished build.", where=str(folder), fix="Name the -o DIR of a build.")
    targets = Report.from_json(report.read_text(encoding="utf-8"), where=str(report)).targets
    if target not in targets:
        raise RecipeError(
            f"The build has no target {target}.", where=str(folder), fix=f"It has {', '.join(targets)} and {FP32}."
        )
    engine, family = targets[target].engine, targets[target].variant
    if engine is not None and engine.endswith(".onnx"):
        return folder / engine, True
    variant = folder / f"variants/{family}"
    if PrecisionPlan.from_json((variant / "precision_plan.json").read_text(encoding="utf-8")).emulated:
        raise RecipeError(
            f"The variant {family} has types that ONNX Runtime's CPU provider does not run.",
            where=f"target {target}",
            fix="Evaluate a target in FP16, FP8, INT8 or INT4.",
        )
    return variant / "model.onnx", False


def _tokenizer(build: str | None, given: str | None, max_length: int) -> TextTokenizer:
    for place in _tokenizers(build, given):
        if place is not None and Path(place).exists():
            return load_tokenizer(Path(place), max_length=max_length)
    raise RecipeError("There is no tokenizer.", where="model_args", fix="Give tokenizer=FOLDER, the model's own.")


def _tokenizers(build: str | None, given: str | None) -> Iterator[str | Path | None]:
    yield given
    if given is None and build is not None:
        recipe = stored_recipe(Path(build))
        yield from (recipe.validate_.tokenizer, recipe.calibration.tokenizer, recipe.source.huggingface)
