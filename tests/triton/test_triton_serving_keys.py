"""Version policy, rate limits, the response cache and labels: what is asked stands in the configuration, and is checked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import text_format
from triton_models import classifier
from tritonclient.grpc import model_config_pb2 as pb

from pipeline.errors import PublishError, RecipeError
from pipeline.recipe import RateLimiter, TritonConfig, VersionPolicy, merge, parse
from pipeline.triton.checker import check_repository
from pipeline.triton.repository import write_repository
from pipeline.triton.rollback import rollback
from pipeline.triton.served import onnx_model
from pipeline.triton.server_flags import server_flags

LABELS = "cat\ndog\ntoad, green\n"
ASKED = TritonConfig(
    version_policy=VersionPolicy(latest=2),
    rate_limiter=RateLimiter(resources={"scratch": 4}, global_resources={"licence": 1}, priority=2),
    response_cache=True,
)


def write(folder: Path, *, config: TritonConfig = ASKED, labels: str = LABELS, seed: int = 0) -> Path:
    """A repository with the model ``animals``; returns it."""
    (folder / "labels.txt").parent.mkdir(parents=True, exist_ok=True)
    (folder / "labels.txt").write_text(labels)
    path = classifier(folder / f"m{seed}.onnx", seed=seed)
    model = onnx_model(path, name="animals", threads=1, labels=folder / "labels.txt")
    write_repository(folder / "repo", model=model, config=config)
    return folder / "repo"


def read(repo: Path, name: str = "animals") -> pb.ModelConfig:
    return text_format.Parse((repo / name / "config.pbtxt").read_text(), pb.ModelConfig())


def edit(change: Callable[[pb.ModelConfig], object]) -> Callable[[Path], None]:
    def apply(repo: Path) -> None:
        config = read(repo)
        change(config)
        (repo / "animals/config.pbtxt").write_text(text_format.MessageToString(config))

    return apply


def label_path(repo: Path) -> Path:
    return repo / "animals" / read(repo).output[0].label_filename


def another(repo: Path) -> None:
    """A second model for which the resource ``scratch`` is shared."""
    shutil.copytree(repo / "animals", repo / "other")
    config = read(repo, "other")
    config.name = "other"
    setattr(config.instance_group[0].rate_limiter.resources[0], "global", True)
    (repo / "other/config.pbtxt").write_text(text_format.MessageToString(config))


REFUSED: list[tuple[str, Callable[[Path], None]]] = [
    ("instances", edit(lambda c: c.instance_group[0].gpus.append(0))),
    ("rate-limiter", another),
    ("response-cache", edit(lambda c: c.sequence_batching.SetInParent() or c.ClearField("dynamic_batching"))),
    ("response-cache", edit(lambda c: setattr(c.model_transaction_policy, "decoupled", True))),
    ("labels", lambda repo: label_path(repo).unlink()),
]
"""What a real server refuses too; the rest it takes and serves wrongly."""

MUTATIONS: list[tuple[str, str, Callable[[Path], None]]] = [
    *((rule, "error", mutate) for rule, mutate in REFUSED),
    ("version-missing", "warning", edit(lambda c: c.version_policy.specific.versions.extend([1, 3]))),
    ("rate-limiter", "error", edit(lambda c: setattr(c.instance_group[0].rate_limiter.resources[0], "count", 0))),
    ("rate-limiter", "error", edit(lambda c: c.instance_group[0].rate_limiter.resources.add(name="scratch", count=1))),
    ("labels", "error", lambda repo: label_path(repo).write_text("cat\ndog\n") and None),
    ("labels", "error", edit(lambda c: setattr(c.output[0], "label_filename", "../../labels.txt"))),
]


def test_what_was_asked_stands_in_the_configuration(tmp_path: Path) -> None:
    repo = write(tmp_path)
    assert check_repository(repo) == []
    config = read(repo)
    assert config.version_policy.latest.num_versions == 2
    limiter = config.instance_group[0].rate_limiter
    taken = [(r.name, getattr(r, "global"), r.count) for r in limiter.resources]
    assert (limiter.priority, sorted(taken)) == (2, [("licence", True, 1), ("scratch", False, 4)])
    assert config.response_cache.enable
    assert label_path(repo).read_text() == LABELS
    assert server_flags(repo) == ["--cache-config=local,size=268435456", "--rate-limit=execution_count"]
    # The text is a fixed point of the official protobuf.
    body = (repo / "animals/config.pbtxt").read_text().split("\n", 2)[2]
    assert text_format.MessageToString(config, as_utf8=True) == body


def test_without_the_keys_the_configuration_has_none_of_it(tmp_path: Path) -> None:
    repo = write(tmp_path, config=TritonConfig())
    config = read(repo)
    assert not any(config.HasField(name) for name in ("version_policy", "response_cache"))
    assert not config.instance_group[0].HasField("rate_limiter")
    assert server_flags(repo) == []


@pytest.mark.parametrize(
    ("policy", "field"), [({"all": True}, "all"), ({"specific": "1"}, "specific"), ({"latest": 1}, "latest")]
)
def test_version_policies(tmp_path: Path, policy: dict[str, object], field: str) -> None:
    repo = write(tmp_path, config=TritonConfig(version_policy=VersionPolicy(**policy)))  # type: ignore[arg-type]
    assert read(repo).version_policy.WhichOneof("policy_choice") == field
    assert check_repository(repo) == []


def test_each_version_keeps_its_labels(tmp_path: Path) -> None:
    """The labels are the model's, not the folder's: a rollback brings the older ones back."""
    repo = write(tmp_path)
    write(tmp_path, labels="cow\npig\nhen\n", seed=1)
    assert label_path(repo).read_text() == "cow\npig\nhen\n"
    assert rollback(repo) == {"animals": (2, 1)}
    assert label_path(repo).read_text() == LABELS
    assert check_repository(repo) == []


@pytest.mark.parametrize(
    ("labels", "said"),
    [("", "empty"), ("cat\n\ndog\n", "Line 2"), ("cat\ndog\n", "2 labels need"), ("a\nb\nc\nd\n", "4 labels need")],
)
def test_labels_that_name_no_classes_are_refused(tmp_path: Path, labels: str, said: str) -> None:
    with pytest.raises(PublishError, match=said):
        write(tmp_path, labels=labels)
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(("rule", "severity", "mutate"), MUTATIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_each_mutation_is_found(tmp_path: Path, rule: str, severity: str, mutate: Callable[[Path], None]) -> None:
    repo = write(tmp_path)
    mutate(repo)
    found = check_repository(repo)
    assert (rule, severity) in {(p.rule, p.severity) for p in found}, [str(p) for p in found]
    assert all(p.where and p.message and p.fix for p in found)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("version_policy", {"latest": 1, "all": True}, "exactly one of latest, all, specific"),
        ("version_policy", {}, "found none"),
        ("version_policy", {"specific": [0]}, "version_policy.specific"),
        ("rate_limiter", {"resources": {"r": 0}}, "rate_limiter.resources.r"),
        ("rate_limiter", {"resources": {"r": 1}, "global_resources": {"r": 1}}, "refuses both"),
        ("rate_limiter", {"priorty": 2}, "did you mean triton.rate_limiter.priority"),
        ("gpus", [-1], "triton.gpus"),
    ],
)
def test_wrong_values_name_the_key(key: str, value: object, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse({"source": {"onnx": "m.onnx"}, "triton": {key: value}})


def test_the_keys_are_flags() -> None:
    flags = {"triton.version_policy.specific": "1,3", "triton.rate_limiter.resources.scratch": "4", "triton.gpus": "1"}
    made = parse(merge({"source": {"onnx": "m.onnx"}}, flags)).triton
    assert made.version_policy == VersionPolicy(specific=(1, 3))
    assert (made.rate_limiter, made.gpus) == (RateLimiter(resources={"scratch": 4}), (1,))
