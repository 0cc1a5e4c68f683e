"""Graphs to TensorRT engines. Building happens in child processes: some inputs make the library end its process."""

from gemma4_export.runtime.engine.artifact import Compiled, compile_artifact
from gemma4_export.runtime.engine.build import BuiltEngine, build_engine, build_engines
from gemma4_export.runtime.engine.record import EngineRecord, TensorRecord, read_record
from gemma4_export.runtime.engine.request import EngineRequest

__all__ = [
    "BuiltEngine",
    "Compiled",
    "EngineRecord",
    "EngineRequest",
    "TensorRecord",
    "build_engine",
    "build_engines",
    "compile_artifact",
    "read_record",
]
