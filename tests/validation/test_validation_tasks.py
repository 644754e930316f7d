from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Validation
from pipeline.types import TensorInfo
from pipeline.validation.classification import Classification
from pipeline.validation.labels import read_labels, read_pairs
from pipeline.validation.similarity import EmbeddingSimilarity
from pipeline.validation.tasks import open_task


class Given:
    """A runner that gives prepared outputs, batch by batch."""

    inputs = (TensorInfo(name="x", dtype=np.dtype(np.int64), shape=("batch",)),)
    outputs: tuple[TensorInfo, ...] = ()

    def __init__(self, **outputs: np.ndarray) -> None:
        self.given = outputs

    def infer(self, feeds):
        return {name: values[feeds["x"]] for name, values in self.given.items()}

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None: ...


@pytest.fixture
def numbered(list_data):
    def make(count: int, batch: int = 7):
        return list_data([{"x": np.arange(i, min(i + batch, count))} for i in range(0, count, batch)])

    return make


@pytest.mark.parametrize("seed", range(8))
def test_accuracy_and_f1_are_those_of_scikit_learn(seed: int, numbered) -> None:
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 9))
    logits = rng.standard_normal((40, classes)).astype(np.float32)
    labels = rng.integers(0, max(2, classes - 2), 40)  # some classes never occur in the labels
    scores = Classification(name="f1", labels=labels).score(Given(logits=logits), numbered(40))
    predicted = logits.argmax(1)
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert scores["f1_macro"] == scores["f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert scores["f1_micro"] == pytest.approx(f1_score(labels, predicted, average="micro"))
    assert Classification(name="accuracy", labels=labels).score(Given(logits=logits), numbered(40)) == {
        "accuracy": pytest.approx(accuracy_score(labels, predicted))
    }


def test_token_labels_leave_out_what_is_ignored(numbered) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((9, 6, 4)).astype(np.float32)
    labels = rng.integers(0, 4, (9, 5))  # a token short of the output: the rest does not count
    labels[rng.random(labels.shape) < 0.3] = -100
    scores = Classification(name="f1", labels=labels).score(Given(logits=logits), numbered(9, 4))
    keep = labels != -100
    predicted = logits[:, :5].argmax(-1)[keep]
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels[keep], predicted))
    assert scores["f1_macro"] == pytest.approx(f1_score(labels[keep], predicted, average="macro"))


def test_logits_are_preferred_among_outputs(numbered) -> None:
    logits, other = np.eye(4, dtype=np.float32), np.zeros((4, 4), np.float32)
    task = Classification(name="accuracy", labels=np.arange(4))
    assert task.score(Given(hidden=other, logits=logits), numbered(4))["accuracy"] == 1.0


def test_more_labels_than_samples_are_mentioned(numbered, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="pipeline.notice"):
        task = Classification(name="accuracy", labels=np.arange(5))
        assert task.score(Given(y=np.eye(4, 5, dtype=np.float32)), numbered(4))["accuracy"] == 1.0
    assert "first 4 of 5 labels" in caplog.text


@pytest.mark.parametrize(
    ("labels", "outputs", "message"),
    [
        (np.zeros(3, np.int64), {"y": np.zeros((4, 2), np.float32)}, "3 labels for 4 samples"),
        (np.full(4, 2), {"y": np.zeros((4, 2), np.float32)}, "Label 2 is none of the model's 2 classes"),
        (np.full(4, -1), {"y": np.zeros((4, 2), np.float32)}, "Label -1"),
        (np.zeros(4, np.int64), {"y": np.zeros((4, 1), np.float32)}, "No output"),
        (np.zeros(4, np.int64), {"y": np.zeros((4, 3, 2), np.float32)}, "No output"),
        (np.zeros((4, 3), np.int64), {"y": np.zeros((4, 2, 2), np.float32)}, "more labels than the model's 2 tokens"),
        (np.full((4, 2), -100), {"y": np.zeros((4, 2, 2), np.float32)}, "does not count"),
    ],
)
def test_labels_that_do_not_fit(labels, outputs, message: str, numbered) -> None:
    with pytest.raises(DataError, match=message):
        Classification(name="accuracy", labels=labels).score(Given(**outputs), numbered(4))


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_label_files(tmp_path: Path) -> None:
    np.save(tmp_path / "l.npy", np.array([1, 0, 2], np.uint8))
    assert read_labels(tmp_path / "l.npy").tolist() == [1, 0, 2]
    assert read_labels(write(tmp_path / "l.txt", "1\n0\n2\n\n")).tolist() == [1, 0, 2]
    assert read_labels(write(tmp_path / "l.jsonl", '1\n{"label": 0, "text": "é"}\n2')).tolist() == [1, 0, 2]
    assert read_labels(write(tmp_path / "t.jsonl", '{"label": [1]}\n[2, -100, 3]')).tolist() == [
        [1, -100, -100],
        [2, -100, 3],
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", "1\ntwo", "no whole number"),
        ("l.txt", "1\n\n2", "no whole number"),
        ("l.txt", "", "no labels"),
        ("l.jsonl", '{"label": "cat"}', "no class number"),
        ("l.jsonl", '{"text": "a"}', "no class number"),
        ("l.jsonl", "true", "no class number"),
        ("l.jsonl", "1\n[1]", "Some lines"),
        ("l.jsonl", "{", "no JSON"),
        ("l.jsonl", "[" * 100_000, "JSON|nested"),
        ("l.csv", "1", "not read from .csv"),
        ("l.npy", "junk", "cannot be read"),
    ],
)
def test_label_files_that_are_wrong(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(write(tmp_path / name, content))


def test_label_files_that_are_not_there_or_of_objects(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path / "none.txt")
    np.save(tmp_path / "o.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path / "o.npy")
    np.save(tmp_path / "f.npy", np.array([0.5]))
    with pytest.raises(DataError, match="integers"):
        read_labels(tmp_path / "f.npy")


def test_embedding_similarity_against_scipy(list_data) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((6, 5, 4)).astype(np.float32)
    mask = np.array([[1] * k + [0] * (5 - k) for k in (5, 3, 1, 2, 4, 5)])
    pairs = np.array([[0, 1], [1, 2], [3, 4], [5, 0], [2, 5]])
    scores = np.array([0.1, 3.0, 2.0, 2.0, 0.5])
    embeddings = np.stack([t[: int(m.sum())].astype(np.float64).mean(0) for t, m in zip(tokens, mask, strict=True)])
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosine = (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1)
    texts = list_data(
        [{"x": np.arange(4), "attention_mask": mask[:4]}, {"x": np.arange(4, 6), "attention_mask": mask[4:]}]
    )
    task = EmbeddingSimilarity(texts=texts, pairs=pairs, scores=scores)
    found = task.score(Given(hidden=tokens, pooled=tokens[:, 0]), list_data())
    assert found["pearson"] == pytest.approx(pearsonr(cosine, scores).statistic)
    assert found["spearman"] == pytest.approx(spearmanr(cosine, scores).statistic)
    pooled = task.score(Given(pooled=embeddings.astype(np.float32)), list_data())
    assert pooled["pearson"] == pytest.approx(found["pearson"], abs=1e-5)


def test_a_correlation_of_constants_is_none(list_data) -> None:
    texts = list_data([{"x": np.arange(3)}])
    same = np.ones((3, 4), np.float32)
    pairs = np.array([[0, 1], [1, 2], [0, 2]])
    task = EmbeddingSimilarity(texts=texts, pairs=pairs, scores=np.array([1.0, 2.0, 3.0]))
    assert task.score(Given(y=same), list_data()) == {"pearson": None, "spearman": None}
    assert task.score(Given(y=same * np.nan), list_data())["pearson"] is None


def test_embedding_similarity_needs_embeddings(list_data) -> None:
    texts = list_data([{"x": np.arange(3)}])
    task = EmbeddingSimilarity(texts=texts, pairs=np.array([[0, 1], [1, 2]]), scores=np.array([1.0, 2.0]))
    with pytest.raises(DataError, match="no output with embeddings"):
        task.score(Given(y=np.zeros(3, np.float32)), list_data())
    few = EmbeddingSimilarity(texts=texts, pairs=np.array([[0, 9], [1, 2]]), scores=np.array([1.0, 2.0]))
    with pytest.raises(DataError, match="name 10 texts"):
        few.score(Given(y=np.zeros((3, 2), np.float32)), list_data())


PAIRS = [("a red car", "a red bus", 4), ("a red car", "the cat", 0.5), ("the cat", "the dog", 3.5)]


def pairs_file(path: Path) -> Path:
    rows = [json.dumps({"text_a": a, "text_b": b, "score": s}) for a, b, s in PAIRS]
    return write(path, "\n".join(rows) + "\n")


def test_pairs_name_each_text_once(tmp_path: Path) -> None:
    found = read_pairs(pairs_file(tmp_path / "p.jsonl"))
    assert found.texts == ("a red car", "a red bus", "the cat", "the dog")
    assert found.pairs.tolist() == [[0, 1], [0, 2], [2, 3]]
    assert found.scores.tolist() == [4, 0.5, 3.5]


@pytest.mark.parametrize(
    "line",
    ['{"text_a": "a", "text_b": "b"}', '{"text_a": "a", "text_b": 3, "score": 1}', '{"text_a": "a", "text_b": " ", "score": 1}',
     '{"text_a": "a", "text_b": "b", "score": NaN}', '{"text_a": "a", "text_b": "b", "score": true}', "[]"],
)  # fmt: skip
def test_pairs_that_are_wrong(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError) as caught:
        read_pairs(write(tmp_path / "p.jsonl", line + "\n"))
    assert caught.value.where.endswith("p.jsonl:1")


WORDS = {"[PAD]": 0, "[UNK]": 1, "a": 2, "red": 3, "car": 4, "bus": 5, "the": 6, "cat": 7, "dog": 8}


@pytest.fixture
def word_model(tmp_path: Path):
    """A model whose token vectors are an embedding table, for a batch dimension of your choice."""
    table = np.random.default_rng(0).standard_normal((len(WORDS), 6)).astype(np.float32)

    def make(batch: int | str) -> Path:
        ids = [
            helper.make_tensor_value_info(n, TensorProto.INT64, [batch, "seq"]) for n in ("input_ids", "attention_mask")
        ]
        graph = helper.make_graph(
            [helper.make_node("Gather", ["table", "input_ids"], ["hidden"], name="embed")],
            "words",
            ids,
            [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [batch, "seq", 6])],
            [numpy_helper.from_array(table, "table")],
        )
        path = tmp_path / f"words_{batch}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
        return path

    return table, make


@pytest.mark.parametrize("batch", ["batch", 3])
def test_pairs_of_texts_through_a_tokenizer(tmp_path: Path, word_model, batch: int | str, list_data) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    table, make = word_model
    config = Validation(
        task="embedding-similarity",
        labels=str(pairs_file(tmp_path / "p.jsonl")),
        tokenizer=tmp_path / "tokenizer.json",
        batch_size=2,
    )
    with OnnxRuntimeRunner(make(batch)) as runner:
        inputs = tuple(
            TensorInfo(name=i.name, dtype=i.dtype, shape=tuple(d if isinstance(d, int) else str(d) for d in i.shape))
            for i in runner.inputs
        )
        task = open_task(config, inputs)
        assert task is not None
        found = task.score(runner, list_data())

    def embedding(text: str) -> np.ndarray:
        return table[[WORDS[word] for word in text.split()]].astype(np.float64).mean(0)

    cosine = []
    for a, b, _ in PAIRS:
        one, other = embedding(a), embedding(b)
        cosine.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    scores = [score for _, _, score in PAIRS]
    assert found["pearson"] == pytest.approx(pearsonr(cosine, scores).statistic, abs=1e-6)
    assert found["spearman"] == pytest.approx(spearmanr(cosine, scores).statistic)


def test_open_task(tmp_path: Path) -> None:
    labels = str(write(tmp_path / "l.txt", "0\n1"))
    assert open_task(Validation(), ()) is None
    task = open_task(Validation(task="f1", labels=labels), ())
    assert isinstance(task, Classification)
    assert task.labels.tolist() == [0, 1]
    with pytest.raises(RecipeError, match="needs labels"):
        open_task(Validation(task="accuracy"), ())
    with pytest.raises(RecipeError) as caught:
        open_task(Validation(task="acuracy", labels=labels), ())
    assert "accuracy" in caught.value.fix


USER = """
import numpy as np

def mean(runner, data, labels):
    values = [runner.infer(feeds)["y"].mean() for feeds in data]
    return {"mean": np.mean(values), "nan": float("nan"), "lines": len(labels.read_text().split())}

def broken(runner, data, labels):
    raise ZeroDivisionError("oh")

def number(runner, data, labels):
    return 3

def words(runner, data, labels):
    return {"a": "b"}

constant = 4
"""


def test_a_users_task(tmp_path: Path, monkeypatch, numbered) -> None:
    write(tmp_path / "my_own_task.py", USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    labels = str(write(tmp_path / "l.txt", "0\n1"))

    def opened(name: str, *, trust: bool = True):
        task = open_task(Validation(task=f"my_own_task:{name}", labels=labels, trust_data=trust), ())
        assert task is not None
        return task

    runner = Given(y=np.arange(4.0))
    assert opened("mean").score(runner, numbered(4)) == {"mean": 1.5, "nan": None, "lines": 2.0}
    assert opened("mean").name == "my_own_task:mean"
    with pytest.raises(RecipeError, match="not run unless"):
        opened("mean", trust=False)
    for name, message in (
        ("broken", "ZeroDivisionError: oh"),
        ("number", "int, not a mapping"),
        ("words", "no number"),
    ):
        with pytest.raises(DataError, match=message):
            opened(name).score(runner, numbered(4))
    with pytest.raises(DataError, match="cannot be imported"):
        opened("absent")
    with pytest.raises(DataError, match="no function"):
        opened("constant")
