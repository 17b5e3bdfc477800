"""Media in and out: one module per medium."""
