"""Moved to `diffusers_adm.benchmarks.metrics`; this name will be removed in the next release."""

from diffusers_adm.benchmarks.metrics import main


if __name__ == "__main__":
    main()
