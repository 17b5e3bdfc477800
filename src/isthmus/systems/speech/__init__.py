"""Speech: recognised, cleaned."""
