"""Saved pipelines: code files, cards, and transfers to and from the Hub."""
