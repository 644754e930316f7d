"""Everything the user asked for, as one typed object and one YAML file.

A key that is not here is an error that names the nearest right one. The recipe says *what*; nothing in it depends on
the machine that reads it.
"""

from pipeline.recipe.builder import BuilderConfig, ProfileShapes
from pipeline.recipe.data import Calibration, Data, Method, Source, Validation
from pipeline.recipe.policy import (
    ALIASES,
    BLOCKED,
    METHODS,
    NOT_YET,
    SCALED,
    MixedPrecision,
    PolicyConfig,
    Preset,
    RuleConfig,
)
from pipeline.recipe.recipe import Recipe, load, merge, parse, read, to_dict
from pipeline.recipe.triton import DynamicBatching, RateLimiter, TritonConfig, VersionPolicy

__all__ = [
    "ALIASES",
    "BLOCKED",
    "METHODS",
    "NOT_YET",
    "SCALED",
    "BuilderConfig",
    "Calibration",
    "Data",
    "DynamicBatching",
    "Method",
    "MixedPrecision",
    "PolicyConfig",
    "Preset",
    "ProfileShapes",
    "RateLimiter",
    "Recipe",
    "RuleConfig",
    "Source",
    "TritonConfig",
    "Validation",
    "VersionPolicy",
    "load",
    "merge",
    "parse",
    "read",
    "to_dict",
]
