"""The benchmark suite: see `__main__.py` for its commands, `suite.py` for what a benchmark is."""
