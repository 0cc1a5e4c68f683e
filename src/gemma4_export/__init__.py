"""Gemma 4 checkpoints to folders that run: ONNX graphs, TensorRT engines and a small runtime."""

__version__ = "0.1.0"
