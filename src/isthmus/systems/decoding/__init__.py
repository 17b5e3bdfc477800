"""Decoding systems."""
