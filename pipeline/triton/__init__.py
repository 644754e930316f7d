"""The model repository that Triton Inference Server loads: writing it and checking it."""
