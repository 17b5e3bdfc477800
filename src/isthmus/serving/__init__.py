"""Serving: a model behind HTTP, with the interface that OpenAI's clients speak."""
