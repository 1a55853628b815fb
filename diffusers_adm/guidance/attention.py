"""Attention layers that are changed in a twin of the network, for a weaker prediction. The network itself does not change."""

import copy
import math

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from diffusers_adm.checks import one_per_level


class IdentityAttnProcessor:
    """
    Attention in which each token attends only to itself, so that its output is its value. This is the perturbed attention of Ahn et
    al. 2024 (arXiv 2403.17377).
    """

    def __call__(self, attn: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        value = attn.to_qkv(hidden_states).chunk(3, dim=-1)[2]  # (batch, tokens, channels)
        return attn.to_out(value)  # (batch, tokens, out_channels)


class RecordingAttnProcessor:
    """
    Attention that keeps the attention weights of its last call.

    Attributes:
        attention: Weight of each key, `(batch, heads, queries, keys)`.
    """

    attention: torch.Tensor

    def __call__(self, attn: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = attn.to_qkv(hidden_states)  # (batch, tokens, 3 * channels)
        query, key, value = (
            qkv.unflatten(-1, (3, attn.heads, -1)).transpose(1, 3).unbind(2)
        )  # (batch, heads, tokens, dim)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5  # (batch, heads, queries, keys)
        self.attention = scores.softmax(dim=-1)
        attended = (self.attention @ value).transpose(1, 2).flatten(2)  # (batch, tokens, channels)
        return attn.to_out(attended)  # (batch, tokens, out_channels)


def attention_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Returns the attention layers of a network by name, such as `"encoder.mid_blocks.0"`."""
    layers = {}
    for name, module in unwrap_module(network).named_modules():
        if hasattr(module, "to_qkv"):
            layers[name.removesuffix(".attention.attn")] = module
    return layers


def layers_of_lowest_resolution(unet: nn.Module) -> tuple[str, ...]:
    """
    Returns the names of the attention layers in the middle block, and in the level with the lowest resolution that has attention.

    Args:
        unet: UNet.
    """
    layers, config = attention_layers(unet), unet.config
    names = {part: [name for name in layers if part in name] for part in ("down_blocks", "mid_blocks", "up_blocks")}
    if not config.attention_resolutions:
        return tuple(names["mid_blocks"])
    level = round(math.log2(config.sample_size / min(config.attention_resolutions)))
    # Number of layers in the encoder's level. The decoder's level has one more.
    count = one_per_level("layers_per_block", config.layers_per_block, len(config.channel_mult))[level]
    return (*names["down_blocks"][-count:], *names["mid_blocks"], *names["up_blocks"][: count + 1])


def with_processor(network: nn.Module, layers: tuple[str, ...], processor: object) -> nn.Module:
    """
    Returns a twin of a network, in which some attention layers have another processor. The twin shares the weights. The given network
    does not change, so that other threads may use it.

    Args:
        network: Network.
        layers: Names of attention layers, see `attention_layers`.
        processor: Processor of these layers.
    """
    network = unwrap_module(network)
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, shared)
    for layer, module in attention_layers(twin).items():
        if layer in layers:
            module.set_processor(processor)
    return twin
