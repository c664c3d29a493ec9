"""Runs the encoder of a bundle with LiteRT, and refuses one that could do more than compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_STATEFUL = {"VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "CALL_ONCE"}


class LiteRtEncoder:
    """An encoder that any number of threads may call.

    An interpreter belongs to one thread at a time. Idle ones are kept on a stack: the one used last is the
    one whose packed weights are still in the processor's cache, and there are only as many as calls were
    ever under way at once. All share the one buffer of the model.
    """

    def __init__(self, flatbuffer: bytes, max_history: int, dimension: int) -> None:
        """Checks the model and prepares it.

        Args:
            flatbuffer: content of encoder.tflite.
            max_history: L that it must read.
            dimension: D that it must read and return.

        Raises:
            ValueError: it is no LiteRT model, uses an operator that is not built in, or has other
                inputs or outputs than vectors (1, L, D), kinds (1, L), mask (1, L) → query (1, D).
        """
        operators = operators_of(flatbuffer)
        foreign = sorted(name for name, builtin in operators if not builtin)
        if foreign:
            raise ValueError(f"it uses operators that are not built in: {', '.join(foreign)}")
        stateful = sorted(name for name, _ in operators if name in _STATEFUL)
        if stateful:
            raise ValueError(f"it keeps state between calls: {', '.join(stateful)}")
        self._flatbuffer = flatbuffer
        first = self._new_interpreter()
        self._inputs, self._output = _match_signature(first, max_history, dimension)
        self._idle: list[Any] = [first]

    def encode(
        self,
        item_vectors_LD: npt.NDArray[np.float32],
        event_kinds_L: npt.NDArray[np.int32],
        mask_L: npt.NDArray[np.float32],
    ) -> npt.NDArray[np.float32]:
        """Returns the query vector of one history, (D,), float32; the arguments as `encoder_inputs` makes them."""
        try:
            interpreter = self._idle.pop()
        except IndexError:
            interpreter = self._new_interpreter()
        interpreter.set_tensor(self._inputs["item_vectors"], item_vectors_LD[None])
        interpreter.set_tensor(self._inputs["event_kinds"], event_kinds_L[None])
        interpreter.set_tensor(self._inputs["mask"], mask_L[None])
        interpreter.invoke()
        query_1D: npt.NDArray[np.float32] = interpreter.get_tensor(self._output)
        # One that failed above is not put back.
        self._idle.append(interpreter)
        return query_1D[0]

    def _new_interpreter(self) -> Any:
        # Imported here: who only reads the registry need not load it.
        from ai_edge_litert.interpreter import Interpreter

        # One thread: a server answers many people at once, each on a thread of its own.
        try:
            interpreter = Interpreter(model_content=self._flatbuffer, num_threads=1)
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"LiteRT refuses it: {error}") from error
        return interpreter


def operators_of(flatbuffer: bytes) -> list[tuple[str, bool]]:
    """Returns (name, whether it is built in) of every operator of a LiteRT model.

    Raises:
        ValueError: it is no LiteRT model.
    """
    from ai_edge_litert import schema_py_generated as schema

    if flatbuffer[4:8] != b"TFL3":
        raise ValueError("it is no LiteRT model")
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    try:
        model = schema.Model.GetRootAsModel(flatbuffer, 0)
        found = []
        for index in range(model.OperatorCodesLength()):
            code = model.OperatorCodes(index)
            # Files of before operator 127 carry the code in the deprecated field.
            builtin = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
            custom = code.CustomCode()
            if builtin == schema.BuiltinOperator.CUSTOM or custom or builtin not in names:
                found.append(((custom or b"?").decode(errors="replace"), False))
            else:
                found.append((names[builtin], True))
        return found
    except (IndexError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise ValueError(f"it is no LiteRT model ({error!r})") from error
    except Exception as error:
        # flatbuffers unpacks with `struct`, whose error is no ValueError.
        raise ValueError(f"it is no LiteRT model ({error!r})") from error


def _match_signature(interpreter: Any, max_history: int, dimension: int) -> tuple[dict[str, int], int]:
    """Returns the tensors' positions, by what each is."""
    expected = {
        "item_vectors": ((1, max_history, dimension), np.float32),
        "event_kinds": ((1, max_history), np.int32),
        "mask": ((1, max_history), np.float32),
    }
    inputs: dict[str, int] = {}
    for detail in interpreter.get_input_details():
        # Converted names look like "serving_default_item_vectors:0".
        name = next((known for known in expected if known in detail["name"]), None)
        if name is None or name in inputs:
            raise ValueError(f"it has an input {detail['name']!r} that nothing fills")
        shape, dtype = expected[name]
        if tuple(detail["shape"]) != shape or detail["dtype"] is not dtype:
            raise ValueError(
                f"its input {name} is {tuple(detail['shape'])} {detail['dtype'].__name__}, not {shape}"
            )
        inputs[name] = detail["index"]
    outputs = interpreter.get_output_details()
    if set(inputs) != set(expected) or len(outputs) != 1:
        raise ValueError(f"it has inputs {sorted(inputs)} and {len(outputs)} outputs")
    if tuple(outputs[0]["shape"]) != (1, dimension) or outputs[0]["dtype"] is not np.float32:
        raise ValueError(f"its output is {tuple(outputs[0]['shape'])}, not {(1, dimension)}")
    return inputs, outputs[0]["index"]
