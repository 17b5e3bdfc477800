"""Speculative decoding systems."""
