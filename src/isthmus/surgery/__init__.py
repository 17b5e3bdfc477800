"""Changes to trained models: parts that are grafted on, taken out or made smaller."""
