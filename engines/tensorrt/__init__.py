"""TensorRT: one builder for TensorRT 10.x and 11.x (on a GPU) and for TensorRT for RTX (without one), and the runner."""
