"""Checkpoints of other formats: read in place by exact ranges, written, and converted.

One module for each format; all of them give `Contents`, which one reader turns into DCP's calls.
"""
