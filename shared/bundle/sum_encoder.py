"""An encoder without weights: the sum of the history's vectors, as a LiteRT model built by hand.

Serves a model of co-occurrence alone, and stands in for a trained encoder where
none is at hand. Needs no TensorFlow.
"""

from __future__ import annotations

import numpy as np


def build_sum_encoder(max_history: int, dimension: int) -> bytes:
    """Returns a LiteRT model: (1, L, D) vectors, (1, L) kinds, (1, L) mask → (1, D) sum of the masked vectors."""
    import flatbuffers  # type: ignore[import-untyped]
    from ai_edge_litert import schema_py_generated as schema

    def tensor(name: str, shape: tuple[int, ...], dtype: int, buffer: int = 0):  # type: ignore[no-untyped-def]
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name, list(shape), dtype, buffer
        return made

    float32, int32 = schema.TensorType.FLOAT32, schema.TensorType.INT32
    empty, axis = schema.BufferT(), schema.BufferT()
    axis.data = np.frombuffer(np.array([1], np.int32).tobytes(), np.uint8)
    shape = schema.BufferT()
    shape.data = np.frombuffer(np.array([1, max_history, 1], np.int32).tobytes(), np.uint8)
    graph = schema.SubGraphT()
    graph.name = "main"
    graph.tensors = [
        tensor("item_vectors", (1, max_history, dimension), float32),
        tensor("event_kinds", (1, max_history), int32),
        tensor("mask", (1, max_history), float32),
        tensor("mask_column_shape", (3,), int32, 2),
        tensor("mask_column", (1, max_history, 1), float32),
        tensor("masked", (1, max_history, dimension), float32),
        tensor("axis", (1,), int32, 1),
        tensor("query", (1, dimension), float32),
    ]
    graph.inputs, graph.outputs = [0, 1, 2], [7]

    def operator(code: int, inputs: list[int], outputs: list[int], options_type: int, options):  # type: ignore[no-untyped-def]
        made = schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = code, inputs, outputs
        made.builtinOptionsType, made.builtinOptions = options_type, options
        return made

    kinds = schema.BuiltinOptions
    graph.operators = [
        operator(0, [2, 3], [4], kinds.ReshapeOptions, schema.ReshapeOptionsT()),
        operator(1, [0, 4], [5], kinds.MulOptions, schema.MulOptionsT()),
        operator(2, [5, 6], [7], kinds.ReducerOptions, schema.ReducerOptionsT()),
    ]
    codes = []
    for builtin in (schema.BuiltinOperator.RESHAPE, schema.BuiltinOperator.MUL, schema.BuiltinOperator.SUM):
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = builtin
        code.version = 1
        codes.append(code)
    model = schema.ModelT()
    model.version, model.operatorCodes, model.subgraphs = 3, codes, [graph]
    model.buffers, model.description = [empty, axis, shape], "sum of the history"
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
