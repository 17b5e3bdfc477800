"""Retrieval: a document through one vector, or through a few, beside its words."""
