"""Benchmarks over the whole system, each a command of ``gptface bench``."""
