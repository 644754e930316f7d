"""Embedding similarity: do the cosines of a model's sentence embeddings order pairs as people do?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibrators.data.spec import DataSpec
from pipeline.errors import DataError
from pipeline.types import Array, CalibrationData, Feeds, Runner, TensorInfo
from pipeline.validation.feeds import fit, mask_of
from pipeline.validation.labels import Pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingSimilarity:
    """Pearson and Spearman correlation of embedding cosines with the scores of labelled pairs.

    A text's embedding is the mean of the token vectors over ``attention_mask`` (of the first output
    ``[batch, tokens, width]``), or the model's own pooled output ``[batch, width]`` if it gives no token vectors.
    Each text is embedded once, however many pairs it is in.

    Attributes:
        texts: The texts as model inputs, one sample each.
        pairs: ``[n, 2]``, indices into the texts.
        scores: ``[n]``.
    """

    texts: CalibrationData
    pairs: Array
    scores: Array
    name: str = "embedding-similarity"

    @classmethod
    def of_pairs(cls, pairs: Pairs, spec: DataSpec, inputs: Sequence[TensorInfo]) -> EmbeddingSimilarity:
        """Return the task for labelled pairs.

        Args:
            pairs: Texts and scores.
            spec: Its tokenizer, lengths and batch size are used.
            inputs: The model's inputs.

        Raises:
            DataError: The tokenizer and the model's inputs do not go together.
            MissingError: The tokenizers package is not installed.
        """
        from calibrators.data.text import texts  # imported here because only this task reads text

        values = list(pairs.texts)
        first = inputs[0].shape[0] if inputs and inputs[0].shape else None
        if isinstance(first, int) and first > 0:
            # A model with a fixed batch drops samples that do not fill one; repeat the last text instead.
            values += [values[-1]] * (-len(values) % first)
        return cls(texts=texts(values, spec, inputs), pairs=pairs.pairs, scores=pairs.scores)

    def score(self, runner: Runner, data: CalibrationData) -> dict[str, float | None]:
        """Return ``pearson`` and ``spearman``; ``data`` is not used, the texts are the pairs' own.

        A correlation is ``None`` where the cosines or the scores are all the same, or not finite.

        Raises:
            DataError: The model gives no embeddings, or there are fewer texts than the pairs name.
        """
        from scipy.stats import pearsonr, spearmanr  # imported here: 0.5 s that other tasks do not need

        embeddings = np.concatenate([embed(runner, feeds) for feeds in self.texts])
        if len(embeddings) <= self.pairs.max():
            raise DataError(
                f"The pairs name {int(self.pairs.max()) + 1} texts, and the data has {len(embeddings)}.",
                fix="Give a sample for every text.",
            )
        a, b = embeddings[self.pairs[:, 0]], embeddings[self.pairs[:, 1]]
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosine = np.einsum("ij,ij->i", a, b) / np.maximum(norms, np.finfo(np.float64).tiny)
        if not np.isfinite(cosine).all() or np.ptp(cosine) == 0 or np.ptp(self.scores) == 0:
            return {"pearson": None, "spearman": None}
        return {
            "pearson": float(pearsonr(cosine, self.scores).statistic),
            "spearman": float(spearmanr(cosine, self.scores).statistic),
        }


def embed(runner: Runner, feeds: Feeds) -> Array:
    """Return the embeddings ``[batch, width]`` (float64) of a batch.

    Raises:
        DataError: The model has no output that holds embeddings.
    """
    outputs = runner.infer(fit(runner, feeds))
    name = _embedding_output(outputs)
    values = np.asarray(outputs[name], np.float64)
    if values.ndim == 2:
        return values
    mask = mask_of(feeds)
    weights = np.ones(values.shape[:2]) if mask is None else (mask > 0).astype(np.float64)
    if weights.shape != values.shape[:2]:
        raise DataError(
            f"The attention mask is {list(weights.shape)}, the token vectors {list(values.shape)}.",
            where=f"output {name}",
            fix="Give a model whose first two output axes are those of its input.",
        )
    pooled: Array = np.einsum("bsw,bs->bw", values, weights) / np.maximum(weights.sum(1, keepdims=True), 1.0)
    return pooled


def _embedding_output(outputs: Mapping[str, Array]) -> str:
    for rank in (3, 2):
        for name, values in outputs.items():
            if values.ndim == rank and np.issubdtype(values.dtype, np.floating):
                return name
    raise DataError(
        "The model has no output with embeddings ([batch, tokens, width] or [batch, width]).",
        where=", ".join(f"{name} {list(values.shape)}" for name, values in outputs.items()),
        fix="Use a feature-extraction model, or write a task of your own (package.module:callable).",
    )
