"""The demo: a small GPT is trained, killed in the middle of a save, and resumed on another number of ranks."""
