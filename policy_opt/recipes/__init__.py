"""Recipes: one published method per file; a recipe is found because its file stands here."""
