"""Triton's official ``ModelConfig`` protobuf as text: the one module that imports ``tritonclient``."""

from __future__ import annotations

from typing import Any

from pipeline.errors import MissingError, PublishError

ModelConfig = Any
"""``tritonclient.grpc.model_config_pb2.ModelConfig``, which has no type stubs."""


def new_config() -> ModelConfig:
    """Return an empty configuration.

    Raises:
        MissingError: ``tritonclient`` is not installed.
    """
    return _schema().ModelConfig()


def to_text(config: ModelConfig) -> str:
    """Return the text of a ``config.pbtxt``; map entries are sorted, so equal configurations give equal text."""
    _schema()
    from google.protobuf import text_format

    return text_format.MessageToString(config, as_utf8=True)


def parse(text: str, *, where: str) -> ModelConfig:
    """Return the configuration that ``text`` describes.

    Raises:
        PublishError: The text does not follow the protobuf (an unknown field, a wrong type); names line and column.
        MissingError: ``tritonclient`` is not installed.
    """
    config = new_config()
    from google.protobuf import text_format

    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        raise PublishError(
            f"The configuration does not follow Triton's protobuf: {' '.join(str(error).split())}",
            where=where,
            fix="Correct the line that the message names, or write the repository again.",
        ) from error
    return config


def type_name(value: int) -> str:
    """Return the name of a ``DataType`` value, such as ``TYPE_FP32``."""
    return str(_schema().DataType.Name(value))


def type_value(name: str) -> int:
    """Return the ``DataType`` value of a name such as ``TYPE_FP32``."""
    return int(_schema().DataType.Value(name))


def kind_cpu() -> int:
    """Return the instance group kind ``KIND_CPU``."""
    return int(_schema().ModelInstanceGroup.KIND_CPU)


def kind_gpu() -> int:
    """Return the instance group kind ``KIND_GPU``."""
    return int(_schema().ModelInstanceGroup.KIND_GPU)


def _schema() -> Any:
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise MissingError(
            "Triton's protobuf definitions are not installed.",
            where=f"package {error.name or 'tritonclient'}",
            fix="Run `pip install '.[triton]'`.",
        ) from error
    return model_config_pb2
