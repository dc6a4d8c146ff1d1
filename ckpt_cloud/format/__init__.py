"""The format: bytes in, values out. No I/O, no torch."""
