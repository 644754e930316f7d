"""A trained model in any accepted form becomes an FP32 ONNX file that computes the same.

:func:`pipeline.sources.export.export` is the one function that the rest of the pipeline calls. torch is imported in
``torch_export.py`` only and transformers in ``huggingface.py`` only, both in a child process, so that this process
stays small and what came with a model cannot reach it.
"""
