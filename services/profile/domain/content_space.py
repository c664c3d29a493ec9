"""One vector an item, of what is said of it, what kind of thing it is, and what it looks like.

    fused = unit([sqrt(w_p) * part_p])    so that the cosine of two items is the weighted mean of the cosines of
                                          the parts that both have (late fusion, as in J. Ngiam et al., 2011)

Parts: character n-grams of the text, character n-grams of the traits, a language model's vector of the text and a
vision model's of the picture. The models' vectors lie in a narrow cone; less their mean, and with their largest
directions damped, cosines tell things apart (J. Su et al., 2021, Whitening sentence representations). A part that
is missing, because it is not known yet or the shop has none, is 0: the item has its place at once, and a better one later.

A space is fitted once and kept: the vectors of one space compare, those of two do not. Shapes: N items, D
components.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.profile.domain.content_vectors import NgramEncoder, unit
from services.profile.domain.items import Item

TEXT_COMPONENTS, TRAIT_COMPONENTS, MEANING_COMPONENTS, PICTURE_COMPONENTS = 96, 64, 128, 96
DIMENSION = TEXT_COMPONENTS + TRAIT_COMPONENTS + MEANING_COMPONENTS + PICTURE_COMPONENTS
# Chosen on development data by `make bench-encoders`, whose numbers stand in docs/benchmarks.md.
TEXT_WEIGHT, TRAIT_WEIGHT, MEANING_WEIGHT, PICTURE_WEIGHT = 0.2, 0.1, 0.3, 0.4
# What a part is worth does not grow with more of it: a fit looks at a sample.
MAX_FITTED = 2_000
# A space is fitted anew when there is so many times more to fit it to.
GROWTH = 4
_LEAST_VARIANCE = 1e-6
_DAMPING = 0.5

Float = npt.NDArray[np.float32]
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Projection:
    """Centres vectors, keeps the directions in which they differ, and damps the largest of these.

    Attributes:
        mean_E, direction_EC: float32, E components in, C out.
    """

    mean_E: Float
    direction_EC: Float

    @classmethod
    def fit(cls, vector_NE: Float, components: int) -> Projection:
        """Returns the projection of some vectors; of fewer than components it has zeros for the others."""
        mean_E = vector_NE.mean(axis=0)
        centred_NE = (vector_NE - mean_E).astype(np.float64)
        variance_E, direction_EE = np.linalg.eigh(centred_NE.T @ centred_NE / len(vector_NE))
        kept = np.argsort(-variance_E)[: min(components, len(vector_NE))]
        kept = kept[variance_E[kept] > _LEAST_VARIANCE * max(variance_E.max(), _LEAST_VARIANCE)]
        direction_EC = np.zeros((vector_NE.shape[1], components), np.float32)
        direction_EC[:, : len(kept)] = direction_EE[:, kept] * variance_E[kept] ** (-0.5 * _DAMPING)
        return cls(mean_E.astype(np.float32), direction_EC)

    def apply(self, vector_NE: Float) -> Float:
        """Returns vectors of unit length, (N, C); those that are 0 stay 0."""
        known_N = vector_NE.any(axis=1)
        out_NC = np.zeros((len(vector_NE), self.direction_EC.shape[1]), np.float32)
        out_NC[known_N] = unit(np.asarray((vector_NE[known_N] - self.mean_E) @ self.direction_EC, np.float32))
        return out_NC


@dataclass(frozen=True, slots=True)
class Contents:
    """What is known of some items, in one order.

    Attributes:
        meaning_NE, picture_NE: from the encoders, rows of 0 where none is known; None without the encoder.
    """

    texts: Sequence[str]
    traits: Sequence[str]
    meaning_NE: Float | None = None
    picture_NE: Float | None = None

    @classmethod
    def of(
        cls, items: Sequence[Item], meaning_NE: Float | None = None, picture_NE: Float | None = None
    ) -> Contents:
        """Returns the contents of items."""
        return cls(
            [text_of(item) for item in items], [traits_of(item) for item in items], meaning_NE, picture_NE
        )


@dataclass(frozen=True, slots=True)
class Amounts:
    """How many items there are to fit a part to, at most MAX_FITTED each."""

    items: int
    meanings: int
    pictures: int

    def outgrows(self, fitted: Amounts) -> bool:
        """Returns whether a space that was fitted to so many should be fitted to these."""
        return any(
            now >= GROWTH * max(then, 1) or (then == 0 and now > 0)
            for now, then in zip(self._each(), fitted._each(), strict=True)
        )

    def _each(self) -> tuple[int, int, int]:
        return self.items, self.meanings, self.pictures


@dataclass(frozen=True, slots=True)
class ContentSpace:
    """A fitted space.

    Attributes:
        version: names the fit: equal contents give an equal one.
        fitted: what it was fitted to.
    """

    text: NgramEncoder
    traits: NgramEncoder
    meaning: Projection | None
    picture: Projection | None
    fitted: Amounts
    version: str

    MODEL = "shopkeeper-content"

    @classmethod
    def fit(cls, contents: Contents) -> ContentSpace:
        """Returns a space of one item or more; deterministic."""
        text = NgramEncoder.fit(contents.texts, TEXT_COMPONENTS)
        traits = NgramEncoder.fit(contents.traits, TRAIT_COMPONENTS)
        digest = hashlib.sha256(f"{text.version}:{traits.version}".encode())
        meanings, meaning = _fit_to_known(contents.meaning_NE, MEANING_COMPONENTS, digest)
        pictures, picture = _fit_to_known(contents.picture_NE, PICTURE_COMPONENTS, digest)
        amounts = Amounts(len(contents.texts), meanings, pictures)
        return cls(text, traits, meaning, picture, amounts, digest.hexdigest()[:12])

    def parts(self, contents: Contents) -> tuple[Float, Float, Float, Float]:
        """Returns vectors of unit length of text, traits, meaning and picture, each (N, its components)."""
        count = len(contents.texts)
        return (
            _padded(self.text.encode(contents.texts), TEXT_COMPONENTS),
            _padded(self.traits.encode(contents.traits), TRAIT_COMPONENTS),
            _projected(self.meaning, contents.meaning_NE, count, MEANING_COMPONENTS),
            _projected(self.picture, contents.picture_NE, count, PICTURE_COMPONENTS),
        )

    def fuse(self, contents: Contents) -> Float:
        """Returns vectors of unit length, (N, DIMENSION), float32; 0 where nothing is known of an item."""
        text_ND, trait_ND, meaning_ND, picture_ND = self.parts(contents)
        weights = (TEXT_WEIGHT, TRAIT_WEIGHT, MEANING_WEIGHT, PICTURE_WEIGHT)
        return fused((text_ND, trait_ND, meaning_ND, picture_ND), weights)

    def arrays(self) -> dict[str, Array]:
        """Returns all that the space is, as arrays: rows of n-grams that occur nowhere are left out."""
        arrays: dict[str, Array] = {
            "version": np.array([self.version, self.text.version, self.traits.version]),
            "fitted": np.array([self.fitted.items, self.fitted.meanings, self.fitted.pictures]),
        }
        for name, encoder in (("text", self.text), ("traits", self.traits)):
            rows = np.flatnonzero(encoder.projection_BD.any(axis=1))
            arrays |= {
                f"{name}_idf": encoder.idf_B,
                f"{name}_rows": rows.astype(np.int32),
                f"{name}_projection": encoder.projection_BD[rows],
            }
        for name, projection in (("meaning", self.meaning), ("picture", self.picture)):
            if projection is not None:
                arrays |= {f"{name}_mean": projection.mean_E, f"{name}_direction": projection.direction_EC}
        return arrays

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> ContentSpace:
        """Returns the space of `arrays`; raises KeyError, ValueError where they are not of one."""
        version, *versions = (str(text) for text in arrays["version"])
        items, meanings, pictures = (int(count) for count in arrays["fitted"].tolist())
        return cls(
            _encoder_of(arrays, "text", versions[0]),
            _encoder_of(arrays, "traits", versions[1]),
            _projection_of(arrays, "meaning"),
            _projection_of(arrays, "picture"),
            Amounts(items, meanings, pictures),
            version,
        )


def _fit_to_known(
    vector_NE: Float | None, components: int, digest: hashlib._Hash
) -> tuple[int, Projection | None]:
    known = None if vector_NE is None else vector_NE[vector_NE.any(axis=1)]
    if known is None or not len(known):
        return 0, None
    digest.update(known.tobytes())
    return len(known), Projection.fit(known, components)


def _encoder_of(arrays: Mapping[str, Array], name: str, version: str) -> NgramEncoder:
    idf_B = np.asarray(arrays[f"{name}_idf"], np.float32)
    part = np.asarray(arrays[f"{name}_projection"], np.float32)
    projection_BD = np.zeros((len(idf_B), part.shape[1]), np.float32)
    projection_BD[arrays[f"{name}_rows"].astype(np.int64)] = part
    return NgramEncoder(idf_B, projection_BD, version)


def _projection_of(arrays: Mapping[str, Array], name: str) -> Projection | None:
    if f"{name}_mean" not in arrays:
        return None
    mean_E, direction_EC = (arrays[f"{name}_{part}"].astype(np.float32) for part in ("mean", "direction"))
    return Projection(mean_E, direction_EC)


def fused(parts: Sequence[Float], weights: Sequence[float]) -> Float:
    """Returns one vector of unit length an item, (N, sum of D): the formula at the head of this file."""
    scaled = [part_ND * np.float32(np.sqrt(weight)) for part_ND, weight in zip(parts, weights, strict=True)]
    return unit(np.concatenate(scaled, axis=1))


def text_of(item: Item) -> str:
    """Returns what is said of an item: the title weighs most, for it comes first and long texts are cut."""
    words = [f"{a.key} {a.value}" for a in item.attributes if isinstance(a.value, str)]
    return " ".join([item.title, item.brand, *words, item.description]).strip()


def traits_of(item: Item) -> str:
    """Returns the category path, brand and attributes of an item, one a word."""
    steps = ["cat:" + ">".join(item.category_path[:depth]) for depth in range(1, len(item.category_path) + 1)]
    brand = [f"brand:{item.brand}"] if item.brand else []
    return " ".join([*steps, *brand, *(f"{a.key}={a.value}" for a in item.attributes), *item.tags])


def digest_of(content: bytes) -> bytes:
    """Returns what names a content: the vectors of one digest and one model are equal, 32 bytes."""
    return hashlib.sha256(content).digest()


def _padded(part_ND: Float, components: int) -> Float:
    missing = components - part_ND.shape[1]
    return np.pad(part_ND, ((0, 0), (0, missing))) if missing else part_ND


def _projected(projection: Projection | None, vector_NE: Float | None, count: int, components: int) -> Float:
    if projection is None or vector_NE is None:
        return np.zeros((count, components), np.float32)
    return projection.apply(vector_NE)
