"""Moved to `diffusers_adm.guidance`; this name will be removed in the next release."""

from diffusers_adm.guidance import CleanClassifierGuidance, CLIPGuidance
