"""What people read about a folder: the model card, and the report of an optimization."""
