"""Each module is one thing to measure: its `run` is called in a process of its own and returns figures."""
