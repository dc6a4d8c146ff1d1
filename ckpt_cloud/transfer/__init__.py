"""Moves bytes, in both directions under one budget."""
