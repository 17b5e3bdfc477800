"""Lenses: what happens inside a model."""
