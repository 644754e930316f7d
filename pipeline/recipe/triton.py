"""The recipe's section on serving: what goes into a Triton model repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pipeline.recipe.section import Section, listed

Count = Annotated[int, Field(ge=1)]


class DynamicBatching(Section):
    """Triton's dynamic batcher."""

    max_queue_delay_us: int = Field(default=0, ge=0)
    """How long a request may wait for others, in microseconds."""
    preferred_batch_sizes: Annotated[tuple[int, ...], BeforeValidator(listed)] = ()
    """Batch sizes to form first."""


class VersionPolicy(Section):
    """Which versions the server loads: exactly one of ``latest``, ``all``, ``specific``. Without it the newest alone."""

    latest: Count | None = None
    """So many of the newest."""
    all: bool = False
    """Every version that is there."""
    specific: Annotated[tuple[Count, ...], BeforeValidator(listed)] = ()
    """These versions and no other; one of them must be there."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("latest", "all", "specific") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"name exactly one of latest, all, specific (found {', '.join(given) or 'none'})")
        return self


class RateLimiter(Section):
    """What an execution takes of resources that models share; the server heeds it with ``--rate-limit=execution_count``."""

    resources: dict[str, Count] = Field(default_factory=dict)
    """Resource to the count that one execution takes of it, on its own device."""
    global_resources: dict[str, Count] = Field(default_factory=dict)
    """The same, of resources that all devices share."""
    priority: int = Field(default=1, ge=1)
    """Waiting models are weighted by it: one of priority 2 runs half as often as one of priority 1."""

    @model_validator(mode="after")
    def _apart(self) -> Self:
        both = sorted(set(self.resources) & set(self.global_resources))
        if both:
            raise ValueError(
                f"{', '.join(both)}: a resource is a device's own or shared by all, and the server refuses both"
            )
        return self


class TritonConfig(Section):
    """The model repository."""

    name: str | None = None
    """Model name in the repository; the recipe's name if not given."""
    max_batch_size: int = Field(default=32, ge=0)
    """Largest batch the server forms; 0 turns batching off."""
    dynamic_batching: DynamicBatching | None = DynamicBatching()
    """``null`` turns it off."""
    instances: int = Field(default=1, ge=1)
    """Model instances per device."""
    gpus: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(listed)] = ()
    """GPUs (by number) that run TensorRT engines; all of the server's if not given."""
    cuda_graphs: Annotated[tuple[Count, ...], BeforeValidator(listed)] = ()
    """Batch sizes that TensorRT engines run as CUDA graphs, at the usual shape of every optimization profile and no other."""
    build_at_load: bool = False
    """Also publish ``<name>-<variant>`` for GPUs whose engine is not built: the Q/DQ ONNX with ONNX Runtime's TensorRT provider, which builds on the serving GPU when it loads the model."""
    engine_cache: str | None = None
    """With ``build_at_load``: the server's folder for engines that it built (its parent must be there); ``/tmp/<model>.engines`` if not given."""
    version_policy: VersionPolicy | None = None
    rate_limiter: RateLimiter | None = None
    response_cache: bool = False
    """Answer a request that was answered before from memory; the server needs ``--cache-config=local,size=BYTES``."""
    labels: Path | None = None
    """Text file with the name of a class on each line, for clients that ask for a classification."""
    ensemble: Literal["none", "text", "embedding", "image"] = "none"
    """``text`` also publishes ``<name>_text``, which takes texts: a tokenizer (calibration's) and the model. ``embedding`` ends in the mean of the token vectors, of length 1. The server's Python needs ``tokenizers``. ``image`` publishes ``<name>_image``, which takes the bytes of pictures: calibration's preprocessing and the model; it needs ``pillow``."""
