"""What people read of a folder: the model card, and the report of an optimization."""
