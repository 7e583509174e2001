"""Benchmarks beside peers: `python -m bench train`, and so on, or `nanochat bench train`."""
