"""The benchmark suite: see `suite.py`."""
