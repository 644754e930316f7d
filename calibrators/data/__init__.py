"""Calibration and held-out data: one reader a file, all of them a :class:`pipeline.types.CalibrationData`.

``open_data`` in :mod:`calibrators.data.open` picks the reader; :mod:`calibrators.data.checks` says what looks wrong
with the data. Nothing is imported here, so that naming the package costs nothing.
"""
