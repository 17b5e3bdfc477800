"""Looking inside: traces, parts that add up, and explanations a reader can check."""
