"""Measurements of time, memory and quality, each a command: `python -m diffusers_adm.benchmarks.<name>`."""
