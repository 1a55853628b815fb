"""Moved to `diffusers_adm.guidance`. This name will be removed in the next release."""

from diffusers_adm.guidance import CleanClassifierGuidance, CLIPGuidance
