"""Evaluation on speech: engines transcribe the same clips, and their tokens, texts, times and words are compared."""
