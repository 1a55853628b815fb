"""Moved to `diffusers_adm.benchmarks.step`. This name will be removed in the next release."""

from diffusers_adm.benchmarks.step import main


if __name__ == "__main__":
    main()
