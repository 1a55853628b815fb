"""Saved pipelines: their code files, their cards, and the Hub."""
