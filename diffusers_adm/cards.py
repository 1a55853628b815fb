"""Moved to `diffusers_adm.hub.cards`. This name will be removed in the next release."""

import sys

from diffusers_adm.hub.cards import main


if __name__ == "__main__":
    main(*sys.argv[1:])
