"""Benchmarks of time, memory and quality. Each module is a command: `python -m diffusers_adm.benchmarks.<name>`."""
