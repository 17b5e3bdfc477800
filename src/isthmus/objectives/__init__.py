"""What models are trained for: losses and corruptions."""
