"""Judge the Q/DQ placement of a graph before TensorRT does: rules with stable ids, reasons, fixes."""
