"""Every error that a user can cause, as one tree.

A :class:`PipelineError` says what happened, where (file, node, tensor, recipe key) and what to do about it.
The command line prints exactly that and exits with ``exit_code``; a traceback is a bug.

    PipelineError                exit 2
    ├── RecipeError              a key, value or combination in the recipe or on the command line
    ├── SourceError              the trained model cannot be read, exported or trusted
    ├── ModelError               an ONNX file or graph that is broken or not supported
    ├── DataError                calibration or validation data
    ├── PolicyError              a rule or preset that cannot be carried out
    ├── QuantizeError            a graph that could not be quantized
    ├── EngineError              an engine that could not be built, loaded or run
    ├── StoreError               the build directory: locked, unwritable, disk full
    ├── PublishError             a model repository that would not serve
    └── MissingError             exit 4: something this machine lacks (a package, a GPU, a driver)
"""

from __future__ import annotations


class PipelineError(Exception):
    """An error that the user can act on.

    Args:
        what: What happened, one sentence.
        where: The file, node, tensor or recipe key concerned; empty if there is none.
        fix: What to do about it, one sentence.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, tuple[type[PipelineError], str, str, str]]:
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def _rebuild(kind: type[PipelineError], what: str, where: str, fix: str) -> PipelineError:
    return kind(what, where=where, fix=fix)


class RecipeError(PipelineError):
    """A key, value or combination in the recipe or on the command line."""


class SourceError(PipelineError):
    """The trained model cannot be read, exported or trusted."""


class ModelError(PipelineError):
    """An ONNX file or graph that is broken or not supported."""


class DataError(PipelineError):
    """Calibration or validation data that is missing, malformed or does not fit the model."""


class PolicyError(PipelineError):
    """A rule, preset or precision that cannot be carried out."""


class QuantizeError(PipelineError):
    """A graph that could not be quantized."""


class EngineError(PipelineError):
    """An engine that could not be built, loaded or run."""


class StoreError(PipelineError):
    """The build directory cannot be used: locked, unwritable, disk full."""


class PublishError(PipelineError):
    """A model repository that would not serve."""


class MissingError(PipelineError):
    """Something that this machine lacks: a package, a GPU, a driver."""

    exit_code = 4
