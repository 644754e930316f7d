"""What the repository checker reports, and the stable names of its rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RULES = {
    "repository": "the repository is a folder that holds at least one model folder",
    "config-missing": "every model folder has a config.pbtxt",
    "config-parse": "config.pbtxt follows the official protobuf",
    "name": "the configured name is the folder's name",
    "backend": "the backend is one that this package knows",
    "version": "there is a version folder (digits, no leading zero) and the version policy serves one that exists",
    "version-ignored": "every other folder is one that the server uses",
    "version-missing": "every version that a specific policy names is there",
    "engine-missing": "every served version holds the file that the backend loads",
    "engine-unreadable": "the engine loads in ONNX Runtime",
    "external-data": "the engine's external data is beside it, complete and inside the folder",
    "default-file": "engines by compute capability have no default file: the server falls back to it silently",
    "tensor-names": "the configuration lists the engine's inputs and no output that it lacks",
    "data-type": "every data type is the engine's",
    "dims": "every shape is the engine's",
    "max-batch-size": "batching only where every input and output has an open first dimension",
    "dynamic-batching": "dynamic batching only where batching is on",
    "preferred-batch": "preferred batch sizes lie between 1 and max_batch_size",
    "instances": "every instance group has at least one instance",
    "manifest": "a version of TensorRT engines has a readable manifest, which tells their profiles",
    "file-changed": "every file of a version is the one that its manifest lists",
    "profile-batch": "every TensorRT engine has a profile that takes max_batch_size",
    "profile-dims": "the configuration's shapes lie within a profile of every engine",
    "instance-profiles": "instances name every profile of the engines, and no other: unnamed, the server uses the first alone",
    "cuda-graphs": "CUDA graphs are captured for batches that are formed and shapes of every input within a profile",
    "warm-up-profile": "every warm-up request fits a profile of every engine, and every profile is warmed up",
    "accelerator": "an execution accelerator is TensorRT on a GPU's onnxruntime instances, with parameters that the backend knows",
    "accelerator-precision": "the accelerator sets no precision flag: with one TensorRT ignores the precisions of the graph",
    "accelerator-profile": "the accelerator's profiles name every open input alike and take max_batch_size",
    "rate-limiter": "a resource has a name and a count, once in a group, and is a device's own or shared by all, not both",
    "response-cache": "answers are remembered only of models whose requests stand alone (no sequences, one answer each)",
    "labels": "a label file lies in the model's folder and has a line for each class",
    "python-model": "a model of the python backend holds model.py: the server hangs without it",
    "ensemble-model": "every step of an ensemble names a model of the repository",
    "ensemble-batch": "no step of an ensemble takes smaller batches than the ensemble",
    "ensemble-tensor": "every input of every step is made before it, and every output of the ensemble by some step",
    "ensemble-type": "a tensor has one data type where it is made and where it is read",
    "ensemble-dims": "a tensor's shapes agree where it is made and where it is read",
    "warm-up-inputs": "a warm-up request gives every input and no other",
    "warm-up-type": "warm-up data has the input's type",
    "warm-up-dims": "warm-up shapes are sizes, not -1, and fit the input",
    "warm-up-batch": "a warm-up request's batch is at least 1 and no larger than max_batch_size",
    "warm-up-data": "warm-up data is zeros or a file of the request's size; random bytes may be out of range",
    "warm-up-runs": "the engine runs on the warm-up request: the server refuses a model whose warm-up fails",
}
"""Rule id to what holds when it is kept. Ids do not change between versions."""


Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A rule that a repository breaks.

    Attributes:
        rule: A key of :data:`RULES`.
        severity: ``error``: the server would refuse the model or serve it wrongly; ``warning``: it may surprise.
        where: File and field, relative to the repository.
        message: What is wrong, one sentence.
        fix: What to do about it.
    """

    rule: str
    severity: Severity
    where: str
    message: str
    fix: str

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"no such rule: {self.rule}")

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} [{self.rule}]\n  where: {self.where}\n  fix: {self.fix}"
