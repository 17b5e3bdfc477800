"""Indexes: what is searched by vectors, by words, by several vectors, and by all of them fused."""
