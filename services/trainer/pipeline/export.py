"""The encoder from TensorFlow to LiteRT, and proof that both say the same."""

from __future__ import annotations

import contextlib
import io
import time

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from services.trainer.pipeline.dataset import HeldOut, Histories
from services.trainer.pipeline.sequence_model import SequenceModel
from services.trainer.pipeline.transformer import Encoder
from shared.bundle.encoder import LiteRtEncoder
from shared.bundle.history import History, encoder_inputs

Float32 = npt.NDArray[np.float32]


def serving_function(encoder: Encoder) -> tf.types.experimental.ConcreteFunction:
    """Returns the function that serves: (1, L, D) vectors, (1, L) kinds, (1, L) mask → (1, D)."""
    length, width = encoder.size.max_history, encoder.size.dimension

    @tf.function(
        input_signature=[
            tf.TensorSpec((1, length, width), tf.float32, name="item_vectors"),
            tf.TensorSpec((1, length), tf.int32, name="event_kinds"),
            tf.TensorSpec((1, length), tf.float32, name="mask"),
        ],
        autograph=False,
    )
    def encode(item_vectors: tf.Tensor, event_kinds: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        causal_LL = tf.constant(np.tril(np.ones((length, length), np.float32)))
        allowed_1LL = causal_LL[None] * mask[:, None, :]
        return encoder(item_vectors, event_kinds, allowed_1LL, newest_only=True)[:, -1]

    return encode.get_concrete_function()


def convert(encoder: Encoder) -> bytes:
    """Returns the encoder as a LiteRT model of built-in operators only.

    Raises:
        ValueError: it cannot be converted so.
    """
    # Weights become constants: a variable would have to be initialised before the first call, and holds state.
    frozen = convert_variables_to_constants_v2(serving_function(encoder))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([frozen], encoder)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    # The converter writes what nobody asked for to standard output.
    with contextlib.redirect_stdout(io.StringIO()):
        converted: bytes = converter.convert()
    return converted


def measure_parity(
    model: SequenceModel, flatbuffer: bytes, histories: Histories, held_out: HeldOut, limit: int = 64
) -> tuple[float, float]:
    """Compares packed training code with serving code on real histories.

    Returns:
        The largest difference of a component of a query vector, over the largest component; and the
        median milliseconds of one encoding as it is served.
    """
    some = held_out.take(np.linspace(0, len(held_out) - 1, min(limit, len(held_out))).astype(np.int64))
    trained_BD = model.encode(histories, some)
    vectors_ID = model.item_vectors()
    size = model.size
    runner = LiteRtEncoder(flatbuffer, size.max_history, size.dimension)
    differences: list[float] = []
    seconds: list[float] = []
    for row in range(len(some)):
        items, kinds = some.prefix(histories, row)
        inputs = encoder_inputs(History(items.astype(np.int64), kinds), vectors_ID, size.max_history)
        started = time.perf_counter()
        served_D = runner.encode(*inputs)
        seconds.append(time.perf_counter() - started)
        scale = max(1.0, float(np.abs(trained_BD[row]).max()))
        differences.append(float(np.abs(served_D - trained_BD[row]).max()) / scale)
    # NumPy's max hands a not-a-number on, where Python's would lose it.
    worst = float(np.nan_to_num(np.max(differences), nan=np.inf))
    return worst, float(np.median(seconds) * 1e3)
