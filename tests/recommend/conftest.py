"""A recommend service on a socket for each test that asks for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.recommend.shop import Shop


@pytest.fixture
def make_shop(keys_dir: Path, tmp_path: Path) -> Iterator[Callable[..., Shop]]:
    """Returns a function that makes a shop; `start` it when its world is as wanted."""
    shops: list[Shop] = []

    def make(**settings: Any) -> Shop:
        shops.append(Shop(keys_dir, tmp_path / f"shop-{len(shops)}", **settings))
        return shops[-1]

    yield make
    for shop in shops:
        shop.close()
