"""Checkpoints and command-line flags of the original code (openai/guided-diffusion)."""
