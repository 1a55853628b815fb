"""Moved to `diffusers_adm.pipelines.cascade`. This name will be removed in the next release."""

from diffusers_adm.pipelines.cascade import draw_cascade
