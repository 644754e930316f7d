"""Runs ONNX models on this machine: one session, or segment by segment where the weights do not fit into memory."""
