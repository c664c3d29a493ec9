"""The causal Transformer over packed histories (TensorFlow, Keras layers).

After SASRec (Kang & McAuley, 2018) with what later work found to help: a filter beside attention (BSARec,
Shin et al., 2024), here a causal exponential moving average; tied output and softmax loss (Klenitskiy &
Vasilev, 2023); relative position bias (T5) instead of absolute positions.

    x_t  = LN(v_item(t) + e_kind(t))
    low  = causal exponential moving average of x, a decay for each of four groups of channels
    f    = LN(x + drop(low + gamma * (x - low)))
    a    = LN(x + drop(attention(x)))
    h    = .7 f + .3 a
    x'   = LN(h + drop(W2 gelu(W1 h)))

B = rows, T = tokens, D = dimension, H = heads. Tokens of different people never meet: `allowed_BTT` is
block-diagonal and causal.
"""

from __future__ import annotations

import os

# The log of TensorFlow's start would drown the run's own.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import tensorflow as tf

from services.trainer.domain.hyper_parameters import HyperParameters
from shared.bundle.history import KIND_COUNT

_INITIAL_STDDEV = 0.02
_FILTER_GROUPS = 4
# Finite, so that a row with nothing allowed stays a number.
_FORBIDDEN = -1e9


def _dropout(x: tf.Tensor, rate: float, seed_2: tf.Tensor | None) -> tf.Tensor:
    """Drops by a seed of the step's own, so that a run can be repeated; does nothing without one."""
    if seed_2 is None or rate == 0:
        return x
    keep = tf.random.stateless_uniform(tf.shape(x), seed_2) >= rate
    return tf.where(keep, x / (1 - rate), 0.0)


def _fold(seed_2: tf.Tensor | None, number: int) -> tf.Tensor | None:
    return None if seed_2 is None else seed_2 + tf.constant([0, number], tf.int32)


class Block(keras.layers.Layer):
    """One block of the formula above."""

    def __init__(self, size: HyperParameters, number: int) -> None:
        super().__init__(name=f"block_{number}")
        self.size, self.number = size, number
        initial = keras.initializers.RandomNormal(stddev=_INITIAL_STDDEV, seed=1000 + number)
        self._initial = initial

    def build(self, _shape: object = None) -> None:
        """Creates the weights."""
        width, heads, length = self.size.dimension, self.size.heads, self.size.max_history

        def weight(name: str, shape: tuple[int, ...], seed: int) -> tf.Variable:
            initial = keras.initializers.RandomNormal(stddev=_INITIAL_STDDEV, seed=seed + 100 * self.number)
            return self.add_weight(name=name, shape=shape, initializer=initial)

        self.qkv = weight("qkv", (width, 3 * width), 1)
        self.out = weight("out", (width, width), 2)
        self.expand = weight("expand", (width, 4 * width), 3)
        self.expand_bias = self.add_weight(name="expand_bias", shape=(4 * width,), initializer="zeros")
        self.contract = weight("contract", (4 * width, width), 4)
        self.contract_bias = self.add_weight(name="contract_bias", shape=(width,), initializer="zeros")
        self.position_bias = self.add_weight(name="position_bias", shape=(heads, length), initializer="zeros")
        # Spread over half-lives of about half an event to seven events.
        rates = [-1.2, 0.0, 1.0, 2.2]
        self.decay_logit = self.add_weight(
            name="decay_logit", shape=(_FILTER_GROUPS,), initializer=lambda *_, **__: tf.constant(rates)
        )
        self.gamma = self.add_weight(name="gamma", shape=(width,), initializer="zeros")
        self.norms = [keras.layers.LayerNormalization(epsilon=1e-6, name=f"norm_{i}") for i in range(3)]
        for norm in self.norms:
            norm.build((None, None, width))
        self.built = True

    def call(
        self,
        x_BTD: tf.Tensor,
        allowed_BTT: tf.Tensor,
        distance_TT: tf.Tensor,
        seed_2: tf.Tensor | None = None,
        *,
        newest_only: bool = False,
    ) -> tf.Tensor:
        """Returns x' of the formula; `seed_2` drops, None does not.

        Args:
            newest_only: of the last token alone, (B, 1, D): what serving reads of the last block.
        """
        rate, base = self.size.dropout, 10 * self.number
        all_BTD = x_BTD
        if newest_only:
            x_BTD, allowed_BTT, distance_TT = x_BTD[:, -1:], allowed_BTT[:, -1:], distance_TT[-1:]
        forbidden_B1TT = (1.0 - allowed_BTT[:, None]) * _FORBIDDEN
        low_BTD = self._moving_average(all_BTD, forbidden_B1TT, distance_TT)
        filtered_BTD = low_BTD + self.gamma * (x_BTD - low_BTD)
        f_BTD = self.norms[0](x_BTD + _dropout(filtered_BTD, rate, _fold(seed_2, base)))
        attended_BTD = self._attention(x_BTD, all_BTD, forbidden_B1TT, distance_TT, _fold(seed_2, base + 1))
        a_BTD = self.norms[1](x_BTD + _dropout(attended_BTD, rate, _fold(seed_2, base + 2)))
        share = self.size.filter_share
        h_BTD = share * f_BTD + (1 - share) * a_BTD
        inner = _matmul(h_BTD, self.expand) + self.expand_bias
        # The tanh form: LiteRT computes it with the same operators as TensorFlow.
        inner = 0.5 * inner * (1.0 + tf.tanh(0.7978845608 * (inner + 0.044715 * inner * inner * inner)))
        inner = _dropout(inner, rate, _fold(seed_2, base + 3))
        fed_BTD = _matmul(inner, self.contract) + self.contract_bias
        return self.norms[2](h_BTD + _dropout(fed_BTD, rate, _fold(seed_2, base + 4)))

    def _moving_average(
        self, x_BTD: tf.Tensor, forbidden_B1TT: tf.Tensor, distance_TT: tf.Tensor
    ) -> tf.Tensor:
        log_decay_G = tf.math.log_sigmoid(tf.convert_to_tensor(self.decay_logit))
        logits_BGTT = log_decay_G[None, :, None, None] * distance_TT[None, None] + forbidden_B1TT
        return _merge(tf.matmul(tf.nn.softmax(logits_BGTT), _split(x_BTD, _FILTER_GROUPS)))

    def _attention(
        self,
        x_BTD: tf.Tensor,
        all_BTD: tf.Tensor,
        forbidden_B1TT: tf.Tensor,
        distance_TT: tf.Tensor,
        seed_2: tf.Tensor | None,
    ) -> tf.Tensor:
        if x_BTD is all_BTD:
            parts = tf.split(_matmul(x_BTD, self.qkv), 3, axis=-1)
        else:
            width, qkv = self.size.dimension, tf.convert_to_tensor(self.qkv)
            parts = [
                _matmul(x_BTD, qkv[:, :width]),
                *tf.split(_matmul(all_BTD, qkv[:, width:]), 2, axis=-1),
            ]
        q, k, v = (_split(part, self.size.heads) for part in parts)
        bias_HTT = tf.gather(tf.convert_to_tensor(self.position_bias), tf.cast(distance_TT, tf.int32), axis=1)
        scale = (self.size.dimension // self.size.heads) ** -0.5
        logits_BHTT = tf.matmul(q, k, transpose_b=True) * scale + bias_HTT[None] + forbidden_B1TT
        weights_BHTT = _dropout(tf.nn.softmax(logits_BHTT), self.size.dropout, seed_2)
        return _matmul(_merge(tf.matmul(weights_BHTT, v)), self.out)


def _matmul(x_BTD: tf.Tensor, weight_DE: tf.Variable | tf.Tensor) -> tf.Tensor:
    """Multiplies with one flat product: faster than a batch of small ones."""
    shape = tf.shape(x_BTD)
    width = x_BTD.shape[-1]
    flat = tf.matmul(tf.reshape(x_BTD, [-1, width]), tf.convert_to_tensor(weight_DE))
    batch = shape[0] if x_BTD.shape[0] is None else x_BTD.shape[0]
    return tf.reshape(flat, [batch, x_BTD.shape[1], flat.shape[-1]])


def _split(x_BTD: tf.Tensor, groups: int) -> tf.Tensor:
    """(B, T, D) → (B, G, T, D / G)."""
    batch = tf.shape(x_BTD)[0] if x_BTD.shape[0] is None else x_BTD.shape[0]
    return tf.transpose(
        tf.reshape(x_BTD, [batch, x_BTD.shape[1], groups, x_BTD.shape[2] // groups]), [0, 2, 1, 3]
    )


def _merge(x_BGTd: tf.Tensor) -> tf.Tensor:
    """(B, G, T, d) → (B, T, G * d)."""
    batch = tf.shape(x_BGTd)[0] if x_BGTd.shape[0] is None else x_BGTd.shape[0]
    return tf.reshape(
        tf.transpose(x_BGTd, [0, 2, 1, 3]), [batch, x_BGTd.shape[2], x_BGTd.shape[1] * x_BGTd.shape[3]]
    )


class Encoder(keras.layers.Layer):
    """Item vectors and kinds of T events → a query vector at each of them."""

    def __init__(self, size: HyperParameters) -> None:
        super().__init__(name="encoder")
        self.size = size
        self.blocks = [Block(size, number) for number in range(size.blocks)]

    def build(self, _shape: object = None) -> None:
        """Creates the weights."""
        initial = keras.initializers.RandomNormal(stddev=_INITIAL_STDDEV, seed=7)
        self.kind_vectors = self.add_weight(
            name="kind_vectors", shape=(KIND_COUNT, self.size.dimension), initializer=initial
        )
        self.norm = keras.layers.LayerNormalization(epsilon=1e-6, name="norm_in")
        self.norm.build((None, None, self.size.dimension))
        for block in self.blocks:
            block.build()
        self.built = True

    def call(
        self,
        vectors_BTD: tf.Tensor,
        kinds_BT: tf.Tensor,
        allowed_BTT: tf.Tensor,
        seed_2: tf.Tensor | None = None,
        *,
        newest_only: bool = False,
    ) -> tf.Tensor:
        """Returns the query vectors, (B, T, D); (B, 1, D) with `newest_only`.

        Args:
            vectors_BTD: item vectors of the events, oldest first.
            kinds_BT: int32, 0 in padding.
            allowed_BTT: 1.0 where the event of the row may see that of the column, else 0.0.
            seed_2: of the dropout, two int32; None for none.
            newest_only: of the last event alone, for a fraction of the work.
        """
        length = self.size.max_history
        position = tf.range(length, dtype=tf.float32)
        distance_TT = tf.maximum(position[:, None] - position[None, :], 0.0)
        x_BTD = self.norm(vectors_BTD + tf.gather(tf.convert_to_tensor(self.kind_vectors), kinds_BT))
        x_BTD = _dropout(x_BTD, self.size.dropout, _fold(seed_2, 1000))
        for block in self.blocks:
            last = newest_only and block is self.blocks[-1]
            x_BTD = block(x_BTD, allowed_BTT, distance_TT, seed_2, newest_only=last)
        return x_BTD


def allowed_within_segments(segment_BT: tf.Tensor) -> tf.Tensor:
    """Returns which token may see which, (B, T, T) float32: earlier ones, and itself, of the same segment."""
    length = segment_BT.shape[1]
    same = tf.equal(segment_BT[:, :, None], segment_BT[:, None, :]) & (segment_BT[:, None, :] > 0)
    causal = tf.range(length)[:, None] >= tf.range(length)[None, :]
    return tf.cast(same & causal[None], tf.float32)
