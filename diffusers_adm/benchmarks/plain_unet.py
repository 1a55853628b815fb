"""UNet of ADM written in the plainest way, as a measure for speed and memory.

It has the modules and tensor names of the original code: each convolution, norm and activation is an operation of its own, norms are
computed in float32, and attention consists of matrix products and a softmax in float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from diffusers_adm.models import ADMUNet2DModel


NUM_GROUPS = 32


class PlainNorm(nn.GroupNorm):
    """Group normalisation in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).type(x.dtype)


class PlainResnet(nn.Module):
    """
    Residual block with adaptive group normalisation.

    Args:
        in_channels: Number of channels of the input.
        out_channels: Number of channels of the output.
        emb_channels: Number of channels of the embedding.
        resample: `"up"`, `"down"` or `None`.
    """

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, resample: str | None = None):
        super().__init__()
        self.resample = resample
        first = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(PlainNorm(NUM_GROUPS, in_channels), nn.SiLU(), first)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels))
        second = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.out_layers = nn.Sequential(PlainNorm(NUM_GROUPS, out_channels), nn.SiLU(), nn.Dropout(0.0), second)
        self.skip_connection = nn.Identity()
        if in_channels != out_channels:
            self.skip_connection = nn.Conv2d(in_channels, out_channels, 1)

    def resized(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` at the resolution of the output."""
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.in_layers[2](self.resized(self.in_layers[:2](x)))  # (batch, out_channels, height, width)
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, dim=1)  # (batch, out_channels, 1, 1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(self.resized(x)) + self.out_layers[1:](h)


class PlainAttention(nn.Module):
    """
    Self-attention over all pixels.

    Args:
        channels: Number of channels.
        head_dim: Number of channels per head.
    """

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.norm = PlainNorm(NUM_GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        batch, channels = x.shape[:2]
        qkv = self.qkv(self.norm(x.flatten(2)))  # (batch, 3 * channels, pixels)
        heads = qkv.reshape(
            batch * channels // self.head_dim, 3 * self.head_dim, -1
        )  # (batch * heads, 3 * dim, pixels)
        query, key, value = heads.chunk(3, dim=1)
        scale = self.head_dim**-0.25  # of both factors, which is more stable in half precision than of their product
        weight = torch.einsum("bct,bcs->bts", query * scale, key * scale)  # (batch * heads, pixels, pixels)
        weight = weight.float().softmax(dim=-1).type(weight.dtype)
        h = torch.einsum("bts,bcs->bct", weight, value).reshape(batch, channels, -1)
        return x + self.proj_out(h).reshape(x.shape)


class PlainConv(nn.Conv2d):
    """Convolution that takes no notice of the embedding."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class PlainUNet(nn.Module):
    """
    UNet of the same architecture and weights as a given one.

    Args:
        unet: Class-conditional UNet with adaptive group normalisation and residual up- and downsampling.
    """

    def __init__(self, unet: ADMUNet2DModel):
        super().__init__()
        config = unet.config
        width, head_dim, layers = config.model_channels, config.attention_head_dim, config.layers_per_block
        widths = [int(width * multiple) for multiple in config.channel_mult]
        attended = [config.sample_size // 2**level in config.attention_resolutions for level in range(len(widths))]
        emb = 4 * width
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Embedding(unet.class_embedding.num_embeddings, emb)

        def block(channels: int, level: int) -> list[nn.Module]:
            resnet = PlainResnet(channels, widths[level], emb)
            return [resnet, *[PlainAttention(widths[level], head_dim)] * attended[level]]

        encoder, skips, channels = [[PlainConv(config.in_channels, widths[0], 3, padding=1)]], [widths[0]], widths[0]
        for level, level_width in enumerate(widths):
            for _ in range(layers):
                encoder.append(block(channels, level))
                skips.append(channels := level_width)
            if level < len(widths) - 1:
                encoder.append([PlainResnet(channels, channels, emb, "down")])
                skips.append(channels)
        middle = [PlainResnet(channels, channels, emb), PlainAttention(channels, head_dim)]
        self.middle_block = nn.ModuleList([*middle, PlainResnet(channels, channels, emb)])
        decoder = []
        for level in reversed(range(len(widths))):
            for layer in range(layers + 1):
                decoder.append(block(channels + skips.pop(), level))
                channels = widths[level]
                if level > 0 and layer == layers:
                    decoder[-1].append(PlainResnet(channels, channels, emb, "up"))
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, encoder))
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, decoder))
        last = nn.Conv2d(channels, config.out_channels, 3, padding=1)
        self.out = nn.Sequential(PlainNorm(NUM_GROUPS, channels), nn.SiLU(), last)
        self.load_state_dict(unet.to_openai_state_dict())

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Returns the prediction for noised images, `(batch, out_channels, height, width)`."""
        frequencies = torch.arange(self.width // 2, device=sample.device) / (self.width // 2)
        phases = timestep.expand(len(sample))[:, None] * torch.exp(
            -math.log(10000) * frequencies
        )  # (batch, width / 2)
        emb = self.time_embed(torch.cat([phases.cos(), phases.sin()], dim=1).type(sample.dtype))
        emb = emb + self.label_emb(class_labels)  # (batch, 4 * width)
        x, skips = sample, []
        for modules in self.input_blocks:
            for module in modules:
                x = module(x, emb)
            skips.append(x)
        for module in self.middle_block:
            x = module(x, emb)
        for modules in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for module in modules:
                x = module(x, emb)
        return self.out(x)
