"""Moved to `diffusers_adm.guidance.off_the_shelf`; this name will be removed in the next release."""

from diffusers_adm.guidance.off_the_shelf import CleanClassifierGuidance, CLIPGuidance
