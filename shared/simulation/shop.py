"""SIMULATION: the shop's items. Pure; see the package for the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.importing.batches import ItemRecord

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TASTE_DIMENSIONS = 8
COMPANIONS = 3
CURRENCY = "EUR"
MICROS = 1_000_000
# Department -> category -> nouns of its items.
DEPARTMENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Kitchen": {
        "Tea and coffee": ("teapot", "coffee mill", "moka pot", "milk frother"),
        "Cookware": ("frying pan", "casserole", "wok", "saucepan"),
        "Knives": ("chef's knife", "bread knife", "cutting board", "knife block"),
        "Pantry": ("green tea", "coffee beans", "olive oil", "sea salt"),
    },
    "Living": {
        "Lamps": ("table lamp", "floor lamp", "lantern", "string lights"),
        "Cushions": ("cushion", "throw", "floor cushion", "seat pad"),
        "Storage": ("basket", "shelf", "storage box", "coat rack"),
        "Candles": ("scented candle", "tea lights", "candle holder", "incense"),
    },
    "Garden": {
        "Plants": ("fern", "olive tree", "herb pot", "orchid"),
        "Pots": ("plant pot", "hanging planter", "window box", "watering can"),
        "Tools": ("pruning shears", "hand trowel", "garden hose", "rake"),
        "Outdoor dining": ("picnic blanket", "charcoal grill", "cool box", "folding chair"),
    },
    "Sport": {
        "Running": ("running shoes", "running vest", "head torch", "sports watch"),
        "Yoga": ("yoga mat", "yoga block", "meditation cushion", "foam roller"),
        "Cycling": ("bicycle light", "cycling gloves", "helmet", "bicycle pump"),
        "Camping": ("tent", "sleeping bag", "camping stove", "water filter"),
    },
    "Care": {
        "Skin care": ("face cream", "cleansing oil", "sun cream", "hand balm"),
        "Hair care": ("shampoo", "hair oil", "wooden comb", "hair mask"),
        "Bath": ("bath salts", "bath towel", "soap", "body brush"),
        "Fragrance": ("eau de parfum", "room spray", "reed diffuser", "perfume oil"),
    },
    "Study": {
        "Notebooks": ("notebook", "sketchbook", "diary", "index cards"),
        "Pens": ("fountain pen", "ink bottle", "brush pen", "pencil set"),
        "Desk": ("desk lamp", "desk mat", "monitor stand", "pen tray"),
        "Bags": ("backpack", "tote bag", "laptop sleeve", "pencil case"),
    },
}
CONSUMABLE = ("Pantry", "Candles", "Skin care", "Hair care", "Bath")
_ADJECTIVES = (
    "Amber", "Birch", "Classic", "Coastal", "Copper", "Dawn", "Ember", "Fern", "Forest", "Frost", "Harvest",
    "Indigo", "Ivory", "Juniper", "Linen", "Lunar", "Maple", "Meadow", "Mist", "Nordic", "Ocean", "Olive",
    "Pebble", "Quartz", "Rustic", "Saffron", "Slate", "Solar", "Terra", "Velvet", "Willow", "Winter",
)  # fmt: skip
_BRANDS = (
    "Aldera", "Bruma", "Corvid", "Dunholm", "Eskil", "Fjordly", "Galen", "Hexham", "Isola", "Jorvik",
    "Kestrel", "Lindqvist",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shop:
    """I items.

    Attributes:
        seed: what it was made from.
        item_ids: I ids.
        titles: I made-up titles.
        category: (I,) index into `category_names`.
        brand: (I,) index into `brand_names`.
        price: (I,) units of CURRENCY, above 0.
        relative_log_price: (I,) log of price over the median of the item's category.
        quality: (I,) in [-1, 1].
        taste: (I, TASTE_DIMENSIONS) unit vectors.
        companions: (I, COMPANIONS) indices of items.
        appeal: (I,) above 0: how much the plain shop pushes an item.
        launch_day: (I,) days before the end of history at which an item appeared; most long ago.
        consumable: (I,) bool.
        category_direction: (categories, TASTE_DIMENSIONS) unit vectors.
    """

    seed: int
    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    category: Ints
    brand: Ints
    price: Floats
    relative_log_price: Floats
    quality: Floats
    taste: Floats
    companions: Ints
    appeal: Floats
    launch_day: Floats
    consumable: NDArray[np.bool_]
    category_direction: Floats
    department_names: tuple[str, ...]
    category_names: tuple[str, ...]
    brand_names: tuple[str, ...] = _BRANDS

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def price_micros(self) -> Ints:
        """Returns the prices in millionths, rounded to whole cents."""
        return np.rint(self.price * 100).astype(np.int64) * (MICROS // 100)

    def records(self) -> list[ItemRecord]:
        """Returns the catalogue as the importer's items."""
        micros = self.price_micros.tolist()
        return [
            ItemRecord(
                item_id,
                title=self.titles[i],
                description=f"{self.titles[i]}. Made up by a simulation.",
                brand=self.brand_names[self.brand[i]],
                category_path=(
                    self.department_names[self.category[i]],
                    self.category_names[self.category[i]],
                ),
                price_micros=micros[i],
                currency_code=CURRENCY,
                attributes={"simulated": True, "consumable": bool(self.consumable[i])},
            )
            for i, item_id in enumerate(self.item_ids)
        ]


def unit(vectors: Floats) -> Floats:
    """Returns the vectors along the last axis, scaled to length 1."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12))


def make_shop(rng: np.random.Generator, items: int, seed: int) -> Shop:
    """Returns a shop with `items` items (at least one a category), drawn from `rng`."""
    names = [(department, category) for department, group in DEPARTMENTS.items() for category in group]
    categories = len(names)
    if items < categories:
        raise ValueError(f"a shop needs at least {categories} items, one a category")
    department = np.array([list(DEPARTMENTS).index(d) for d, _ in names])
    base = unit(rng.normal(size=(len(DEPARTMENTS), TASTE_DIMENSIONS)))
    direction = unit(base[department] + 0.9 * unit(rng.normal(size=(categories, TASTE_DIMENSIONS))))

    category = np.concatenate((np.arange(categories), rng.integers(0, categories, items - categories)))
    brand = rng.integers(0, len(_BRANDS), items)
    taste = unit(direction[category] + 0.45 * unit(rng.normal(size=(items, TASTE_DIMENSIONS))))
    category_price = np.exp(rng.normal(3.2, 0.6, categories))
    relative = rng.normal(0, 0.45, items)
    price = np.maximum(np.round(category_price[category] * np.exp(relative), 2), 0.5)
    launch = np.where(rng.random(items) < 0.1, rng.uniform(5, 30, items), 10_000.0)
    consumable_categories = np.array([name in CONSUMABLE for _, name in names])

    nouns = [DEPARTMENTS[d][c] for d, c in names]
    titles: list[str] = []
    for c, b in zip(category.tolist(), brand.tolist(), strict=True):
        adjective = _ADJECTIVES[int(rng.integers(len(_ADJECTIVES)))]
        noun = nouns[c][int(rng.integers(len(nouns[c])))]
        titles.append(f"{_BRANDS[b]} {adjective} {noun}")
    return Shop(
        seed=seed,
        item_ids=tuple(f"item-{i:05d}" for i in range(items)),
        titles=tuple(titles),
        category=category,
        brand=brand,
        price=price,
        relative_log_price=relative,
        quality=np.clip(rng.normal(0.1, 0.45, items), -1, 1),
        taste=taste,
        companions=_companions(rng, taste, category, department),
        appeal=np.exp(rng.normal(0, 0.9, items)),
        launch_day=launch,
        consumable=consumable_categories[category],
        category_direction=direction,
        department_names=tuple(d for d, _ in names),
        category_names=tuple(c for _, c in names),
    )


def _companions(rng: np.random.Generator, taste: Floats, category: Ints, department: Ints) -> Ints:
    categories = department.size
    rotation, _ = np.linalg.qr(rng.normal(size=(TASTE_DIMENSIONS, TASTE_DIMENSIONS)))
    # One complement within the department, one in another: tea goes with teapots, and with books.
    complements = np.empty((categories, 2), np.int64)
    for c in range(categories):
        same = np.flatnonzero((department == department[c]) & (np.arange(categories) != c))
        other = np.flatnonzero(department != department[c])
        complements[c] = rng.choice(same), rng.choice(other)
    likeness = (taste @ rotation) @ taste.T
    allowed = (category[None, :, None] == complements[category][:, None, :]).any(axis=2)
    likeness = np.where(allowed, likeness, -np.inf)
    np.fill_diagonal(likeness, -np.inf)
    order = np.argsort(-likeness, axis=1, kind="stable")[:, :COMPANIONS]
    # A complement with too few items repeats its best one.
    usable = np.isfinite(np.take_along_axis(likeness, order, axis=1))
    return np.where(usable, order, order[:, :1])
