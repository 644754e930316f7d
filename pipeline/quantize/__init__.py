"""Q/DQ insertion, FP16 casting, ranges and weights."""
