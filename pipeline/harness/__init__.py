"""Builds in lm-evaluation-harness: ``python -m pipeline.harness --model enginewright --model_args build=DIR --tasks …``."""
