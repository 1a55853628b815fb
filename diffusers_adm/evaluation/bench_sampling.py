"""Moved to `diffusers_adm.benchmarks.sampling`. This name will be removed in the next release."""

from diffusers_adm.benchmarks.sampling import Bench, main


if __name__ == "__main__":
    main()
