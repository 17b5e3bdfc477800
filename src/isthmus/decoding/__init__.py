"""Text decoding: one loop, propose -> score -> accept -> commit -> observe."""
