"""Moved to `diffusers_adm.benchmarks.metrics`. This name will be removed in the next release."""

from diffusers_adm.benchmarks.metrics import main


if __name__ == "__main__":
    main()
