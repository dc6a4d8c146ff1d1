"""Many checkpoints of one training run: steps under a root, which to keep, the newest to resume from."""
