"""Moved to `diffusers_adm.benchmarks.training`. This name will be removed in the next release."""

from diffusers_adm.benchmarks.training import main


if __name__ == "__main__":
    main()
