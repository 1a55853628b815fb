"""Moved to `diffusers_adm.pipelines.cascade`; this name will be removed in the next release."""

from diffusers_adm.pipelines.cascade import draw_cascade
