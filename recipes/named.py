"""Recipes by name: each package in this one that has a `RECIPE`, and folders that `shoal recipe new` made."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from recipes import own
from recipes.recipe import Recipe
from shoal.errors import UsageError, did_you_mean


def names() -> list[str]:
    """As they are given on the command line."""
    found = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(module.name.replace("_", "-") for module in found if module.ispkg)


def named(name: str) -> Recipe:
    """The recipe of that name, or the one in a folder. Raises UsageError with the nearest known one."""
    if (Path(name) / own.SETTINGS).is_file():
        return own.Own(Path(name))
    if name not in names():
        allowed = [*names(), "new", f"a folder with a {own.SETTINGS}"]
        raise UsageError("recipe", got=name, allowed=allowed, do=did_you_mean(name, names()))
    module = importlib.import_module(f"recipes.{name.replace('-', '_')}")
    recipe: Recipe = module.RECIPE
    return recipe
