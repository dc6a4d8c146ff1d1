"""Every server that can be started, in the order in which they are preferred within a dialect."""

from __future__ import annotations

from localstack.recipe import Recipe
from localstack.recipes import azurite, fake_gcs, moto, rclone, seaweedfs

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (seaweedfs.RECIPE, moto.RECIPE, rclone.RECIPE, fake_gcs.RECIPE, azurite.RECIPE)
}
