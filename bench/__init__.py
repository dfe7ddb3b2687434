"""Measurements that need a quiet machine, and so are no tests: `python -m bench [NAME ...]`."""
