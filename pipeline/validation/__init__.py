"""Validation: what quantization costs, measured, and the gates that judge it afterwards.

Measuring (:mod:`~pipeline.validation.validate`) and judging (:mod:`~pipeline.validation.thresholds`) are apart: a
verdict is a pure function of stored measurements, so gates can change without running anything again.
"""
