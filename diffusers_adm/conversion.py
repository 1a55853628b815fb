"""Checkpoints of the published implementation (openai/guided-diffusion), to and fro."""

import re

import torch


# Our names to the published ones; the first rule that matches a whole module path applies.
_MODULE_RULES = [
    (r"time_embedding\.mlp\.linear_1", "time_embed.0"),
    (r"time_embedding\.mlp\.linear_2", "time_embed.2"),
    (r"class_embedding", "label_emb"),
    (r"encoder\.conv_in", "input_blocks.0.0"),
    (r"encoder\.down_blocks\.(?P<block>\d+)\.conv", "input_blocks.{next}.0.op"),
    (r"encoder\.down_blocks\.(?P<block>\d+)\.resnet\.(?P<layer>\w+)", "input_blocks.{next}.0.{layer}"),
    (r"encoder\.down_blocks\.(?P<block>\d+)\.attention\.(?P<layer>[\w.]+)", "input_blocks.{next}.1.{layer}"),
    (r"encoder\.mid_blocks\.0\.resnet\.(?P<layer>\w+)", "middle_block.0.{layer}"),
    (r"encoder\.mid_blocks\.0\.attention\.(?P<layer>[\w.]+)", "middle_block.1.{layer}"),
    (r"encoder\.mid_blocks\.1\.resnet\.(?P<layer>\w+)", "middle_block.2.{layer}"),
]
