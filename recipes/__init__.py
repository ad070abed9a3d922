"""Recipes: whole experiments on the public API; installed as `selectsampler.recipes`."""
