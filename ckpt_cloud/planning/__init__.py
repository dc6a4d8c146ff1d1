"""Deciding what goes where: values in, values out. No I/O, no torch."""
