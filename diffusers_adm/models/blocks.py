"""Building blocks of ADM: timestep embedding, residual block, self-attention, and the encoder of the UNet and the noisy classifier.

Source: Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233), section 3.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from diffusers_adm.checks import check_images, check_types, one_per_image, one_per_level, plain_numbers


TIME_SCALE_SHIFTS = ("scale_shift", "default")
RESAMPLE_TYPES = ("resnet", "conv")


def zero_init(module: nn.Module) -> nn.Module:
    """Sets the parameters of a layer to zero. A residual branch that ends with the layer then adds nothing at initialisation."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def residual_sum(residual: torch.Tensor, branch: torch.Tensor, output_scale_factor: float) -> torch.Tensor:
    """Returns `(residual + branch) / output_scale_factor`. The factor is sqrt(2) in the ablation of Table 1, and 1 otherwise."""
    total = residual + branch
    return total if output_scale_factor == 1.0 else total / output_scale_factor


def upsample_nearest(hidden_states: torch.Tensor) -> torch.Tensor:
    """Doubles height and width by repeating pixels. Returns `(batch, channels, 2 * height, 2 * width)`."""
    if hidden_states.device.type == "cpu" and hidden_states.is_contiguous():
        # `interpolate` is several times slower for large maps on a CPU, unless the memory format is channels-last.
        rows = torch.stack([hidden_states] * 2, dim=-1).flatten(-2)  # (batch, channels, height, 2 * width)
        return torch.stack([rows] * 2, dim=-2).flatten(-3, -2)  # (batch, channels, 2 * height, 2 * width)
    return F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")


class ADMConfigMixin(ConfigMixin):
    """Config whose types are checked. Configs of saved models have one more entry, `auto_map`, which names the file of the code."""

    def register_to_config(self, **kwargs) -> None:
        """
        Registers arguments of the constructor.

        Raises:
            ValueError: If the type of an argument does not fit the annotations of the constructor.
        """
        check_types(type(self).__init__, kwargs)
        super().register_to_config(**plain_numbers(kwargs))

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Reads the model's arguments from a config. `auto_map` is no argument and is left out."""
        config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(config_dict, **kwargs)


class ADMGroupNorm(nn.GroupNorm):
    """Group normalisation that computes in float32 for all dtypes of its input and weights."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype  # (batch, channels, height, width)
        # The CPU kernel casts by itself: with float32 weights it computes in float32. It is slow in channels-last memory format.
        mixed = hidden_states.device.type == "cpu" and hidden_states.is_contiguous() and dtype != torch.float64
        if not mixed:
            hidden_states = hidden_states.float()
        normed = F.group_norm(hidden_states, self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(dtype)  # (batch, channels, height, width)


class ADMTimeEmbedding(nn.Module):
    """
    Sinusoidal embedding of the timestep (cosines first), followed by a two-layer perceptron.

    Args:
        model_channels: Width of the sinusoidal embedding.
        timestep_scale: Factor by which the timestep is multiplied before it is embedded.

    Raises:
        ValueError: If the factor is not a positive number.
    """

    def __init__(self, model_channels: int, timestep_scale: float = 1.0):
        super().__init__()
        if not 0 < timestep_scale < math.inf:
            raise ValueError(f"`timestep_scale` must be positive and finite, but got {timestep_scale}.")
        self.timestep_scale = timestep_scale
        self.time_proj = Timesteps(model_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(model_channels, 4 * model_channels)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float | int) -> torch.Tensor:
        timestep = one_per_image("timestep", timestep, sample).expand(sample.shape[0])  # (batch,)
        timestep = timestep.float() * self.timestep_scale  # (batch,)
        # float32 sinusoids: bfloat16 cannot tell timestep 998 from 999.
        return self.mlp(self.time_proj(timestep).to(sample.dtype))  # (batch, 4 * model_channels)


class ADMDownsample2D(nn.Module):
    """Strided convolution that halves height and width. `downsample_type="conv"` uses it instead of a residual block."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, hidden_states: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return self.conv(hidden_states)  # (batch, channels, height / 2, width / 2)


class ADMUpsample2D(nn.Module):
    """Nearest-neighbour upsampling and a convolution. `upsample_type="conv"` uses it instead of a residual block."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return self.conv(upsample_nearest(hidden_states))  # (batch, channels, 2 * height, 2 * width)


class ADMResnetBlock2D(nn.Module):
    """Residual block conditioned on an embedding. With `resample`, it also halves or doubles height and width (BigGAN).

    With `time_scale_shift="scale_shift"`, the embedding scales and shifts the normalised features (AdaGN, eq. 3 of the
    paper). With `"default"`, it is added before normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        norm_num_groups: int,
        dropout: float,
        time_scale_shift: str,
        output_scale_factor: float,
        resample: str | None = None,
    ):
        super().__init__()
        self.time_scale_shift = time_scale_shift
        self.output_scale_factor = output_scale_factor
        self.resample = resample
        self.act = nn.SiLU()

        self.norm1 = ADMGroupNorm(norm_num_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb_channels, out_channels * (2 if time_scale_shift == "scale_shift" else 1))
        self.norm2 = ADMGroupNorm(norm_num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def _resample(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.resample == "down":
            return F.avg_pool2d(hidden_states, 2)
        if self.resample == "up":
            return upsample_nearest(hidden_states)
        return hidden_states

    def forward(self, hidden_states: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        # Height and width below are those of the output. With `resample`, they are half or twice those of the input.
        residual = self._resample(hidden_states)  # (batch, in_channels, height, width)
        hidden_states = self._resample(self.act(self.norm1(hidden_states)))  # (batch, in_channels, height, width)
        hidden_states = self.conv1(hidden_states)  # (batch, out_channels, height, width)

        emb = self.time_emb_proj(self.act(emb))[:, :, None, None]  # (batch, (2 *) out_channels, 1, 1)
        if self.time_scale_shift == "scale_shift":
            scale, shift = emb.chunk(2, dim=1)  # (batch, out_channels, 1, 1) each
            hidden_states = self.norm2(hidden_states) * (1 + scale) + shift  # (batch, out_channels, height, width)
        else:
            hidden_states = self.norm2(hidden_states + emb)  # (batch, out_channels, height, width)
        hidden_states = self.conv2(self.dropout(self.act(hidden_states)))  # (batch, out_channels, height, width)

        return residual_sum(self.conv_shortcut(residual), hidden_states, self.output_scale_factor)


class ADMAttnProcessor:
    """Scaled dot-product attention through diffusers' attention dispatch, which lets users choose a backend."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "ADMAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = attn.to_qkv(hidden_states)  # (batch, tokens, 3 * channels)
        query, key, value = qkv.unflatten(-1, (3, attn.heads, -1)).unbind(2)  # (batch, tokens, heads, head_dim) each
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )  # (batch, tokens, heads, head_dim)
        return attn.to_out(hidden_states.flatten(2))  # (batch, tokens, out_channels)


class ADMAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention over tokens. The rows of `to_qkv` are ordered (qkv, head, dim)."""

    _default_processor_cls = ADMAttnProcessor
    _available_processors = [ADMAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, channels: int, heads: int, out_channels: int | None = None):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, out_channels or channels)
        self.set_processor(ADMAttnProcessor())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # As a method, because torch 2.6 compiles a graph for each object that is called.
        return self.processor.__call__(self, hidden_states)  # (batch, tokens, out_channels)


class ADMAttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, with a residual connection."""

    def __init__(self, channels: int, heads: int, norm_num_groups: int, output_scale_factor: float):
        super().__init__()
        self.output_scale_factor = output_scale_factor
        self.norm = ADMGroupNorm(norm_num_groups, channels)
        self.attn = ADMAttention(channels, heads)
        zero_init(self.attn.to_out)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(hidden_states).flatten(2).transpose(1, 2)  # (batch, height * width, channels)
        attended = self.attn(tokens).transpose(1, 2)  # (batch, channels, height * width)
        attended = attended.unflatten(2, hidden_states.shape[2:])  # (batch, channels, height, width)
        return residual_sum(hidden_states, attended, self.output_scale_factor)


class ADMBlock(nn.Module):
    """Residual block, followed by self-attention in levels with attention."""

    def __init__(self, resnet: ADMResnetBlock2D, attention: ADMAttentionBlock | None = None):
        super().__init__()
        self.resnet = resnet
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        hidden_states = self.resnet(hidden_states, emb)  # (batch, out_channels, height, width)
        if self.attention is not None:
            hidden_states = self.attention(hidden_states)  # (batch, out_channels, height, width)
        return hidden_states


class ADMUpBlock(ADMBlock):
    """Block of the decoder, which concatenates a skip connection. The last block of a level also doubles height and width."""

    def __init__(
        self,
        resnet: ADMResnetBlock2D,
        attention: ADMAttentionBlock | None = None,
        upsampler: ADMResnetBlock2D | ADMUpsample2D | None = None,
    ):
        super().__init__(resnet, attention)
        self.upsampler = upsampler

    def forward(self, hidden_states: torch.Tensor, skip: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        hidden_states = torch.cat([hidden_states, skip], dim=1)  # (batch, in_channels, height, width)
        hidden_states = super().forward(hidden_states, emb)  # (batch, out_channels, height, width)
        if self.upsampler is not None:
            hidden_states = self.upsampler(hidden_states, emb)  # (batch, out_channels, 2 * height, 2 * width)
        return hidden_states


@dataclass(kw_only=True)
class ADMBlockFactory:
    """Builder of the blocks of one model, with the arguments of [`ADMUNet2DModel`]. It decides which levels have attention.

    Raises:
        ValueError: If the options do not describe a model.
    """

    sample_size: int
    model_channels: int
    channel_mult: tuple[float, ...]
    attention_resolutions: tuple[int, ...]
    attention_head_dim: int | None
    num_attention_heads: int | None
    norm_num_groups: int
    dropout: float
    resnet_time_scale_shift: str
    output_scale_factor: float

    def __post_init__(self):
        self._check_options()
        self.emb_channels = 4 * self.model_channels
        # Per level, highest resolution first.
        self.channels = [int(mult * self.model_channels) for mult in self.channel_mult]
        self.resolutions = [self.sample_size // 2**level for level in range(len(self.channel_mult))]
        self._check_levels()

    def _check_options(self) -> None:
        if (self.attention_head_dim is None) == (self.num_attention_heads is None):
            raise ValueError(
                "Exactly one of `attention_head_dim` and `num_attention_heads` must be given, but got"
                f" {self.attention_head_dim} and {self.num_attention_heads}."
            )
        counts = {
            "`sample_size`": self.sample_size,
            "`model_channels`": self.model_channels,
            "The number of levels in `channel_mult`": len(self.channel_mult),
            "`norm_num_groups`": self.norm_num_groups,
            "`attention_head_dim`": 1 if self.attention_head_dim is None else self.attention_head_dim,
            "`num_attention_heads`": 1 if self.num_attention_heads is None else self.num_attention_heads,
        }
        if not all(0 < mult < math.inf for mult in self.channel_mult):
            raise ValueError(f"`channel_mult` must be positive and finite numbers, but got {self.channel_mult}.")
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, but got {count}.")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"`dropout` must be in [0, 1], but got {self.dropout}.")
        if not 0 < self.output_scale_factor < math.inf:
            raise ValueError(f"`output_scale_factor` must be positive and finite, but got {self.output_scale_factor}.")
        if self.resnet_time_scale_shift not in TIME_SCALE_SHIFTS:
            raise ValueError(
                f"`resnet_time_scale_shift` must be one of {TIME_SCALE_SHIFTS}, but got {self.resnet_time_scale_shift!r}."
            )

    def _check_levels(self) -> None:
        halvings = len(self.channel_mult) - 1
        if self.sample_size % 2**halvings:
            raise ValueError(
                f"`sample_size` must be divisible by {2**halvings}, because `channel_mult` has {halvings + 1} levels, but got"
                f" sample_size={self.sample_size}."
            )
        unknown = sorted(set(self.attention_resolutions) - set(self.resolutions))
        if unknown:
            raise ValueError(
                f"`attention_resolutions` must be among {self.resolutions}, the model's resolutions, but got {unknown}."
            )
        for channels in self.channels:
            if channels < 1 or channels % self.norm_num_groups:
                raise ValueError(
                    f"`norm_num_groups` must divide the channels of each level, but got {self.norm_num_groups} and {channels} channels"
                    f" (model_channels={self.model_channels}, channel_mult={tuple(self.channel_mult)})."
                )

    def resnet(self, in_channels: int, out_channels: int, resample: str | None = None) -> ADMResnetBlock2D:
        """Builds a residual block."""
        return ADMResnetBlock2D(
            in_channels=in_channels,
            out_channels=out_channels,
            emb_channels=self.emb_channels,
            norm_num_groups=self.norm_num_groups,
            dropout=self.dropout,
            time_scale_shift=self.resnet_time_scale_shift,
            output_scale_factor=self.output_scale_factor,
            resample=resample,
        )

    def attention(self, channels: int) -> ADMAttentionBlock:
        """Builds an attention block."""
        return ADMAttentionBlock(
            channels=channels,
            heads=self.heads(channels),
            norm_num_groups=self.norm_num_groups,
            output_scale_factor=self.output_scale_factor,
        )

    def attention_at(self, level: int) -> ADMAttentionBlock | None:
        """Builds the attention block of a level. Returns `None` for a level without attention."""
        return self.attention(self.channels[level]) if self.resolutions[level] in self.attention_resolutions else None

    def heads(self, channels: int) -> int:
        """Returns the number of heads for a number of channels."""
        heads = self.num_attention_heads or channels // self.attention_head_dim
        if heads < 1 or channels % heads or (self.attention_head_dim and heads * self.attention_head_dim != channels):
            raise ValueError(
                f"{channels} channels cannot be divided into heads with attention_head_dim={self.attention_head_dim} and"
                f" num_attention_heads={self.num_attention_heads}. Choose a divisor of {channels}."
            )
        return heads


class ADMEncoder(nn.Module):
    """Encoder and middle of the UNet. The classifier consists of this encoder and a pooling head."""

    def __init__(
        self,
        blocks: ADMBlockFactory,
        in_channels: int,
        layers_per_block: int | tuple[int, ...],
        downsample_type: str,
    ):
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"`in_channels` must be at least 1, but got {in_channels}.")
        layers = one_per_level("layers_per_block", layers_per_block, len(blocks.channels))
        if downsample_type not in RESAMPLE_TYPES:
            raise ValueError(f"`downsample_type` must be one of {RESAMPLE_TYPES}, but got {downsample_type!r}.")
        self.gradient_checkpointing = False
        channels = blocks.channels[0]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        self.skip_channels = [channels]  # output channels of conv_in, then those of each down block
        for level, level_channels in enumerate(blocks.channels):
            for _ in range(layers[level]):
                resnet = blocks.resnet(channels, level_channels)
                self.down_blocks.append(ADMBlock(resnet, blocks.attention_at(level)))
                channels = level_channels
                self.skip_channels.append(channels)
            if level < len(blocks.channels) - 1:
                if downsample_type == "resnet":
                    self.down_blocks.append(ADMBlock(blocks.resnet(channels, channels, resample="down")))
                else:
                    self.down_blocks.append(ADMDownsample2D(channels))
                self.skip_channels.append(channels)
        self.mid_blocks = nn.ModuleList(
            [
                ADMBlock(blocks.resnet(channels, channels), blocks.attention(channels)),
                ADMBlock(blocks.resnet(channels, channels)),
            ]
        )

    def forward(self, sample: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the features at the lowest resolution, and the skip connections, first to last."""
        hidden_states = self.conv_in(sample)  # (batch, channels, height, width)
        skips = [hidden_states]
        for block in self.down_blocks:
            hidden_states = self._run(block, hidden_states, emb)  # (batch, channels, height / 2**k, width / 2**k)
            skips.append(hidden_states)
        for block in self.mid_blocks:
            hidden_states = self._run(block, hidden_states, emb)  # (batch, channels, height / 2**k, width / 2**k)
        return hidden_states, skips

    def _run(self, block: nn.Module, hidden_states: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, hidden_states, emb)
        return block(hidden_states, emb)


def check_sample(sample: torch.Tensor, in_channels: int, num_levels: int) -> None:
    """
    Checks the input images of a model, `(batch, in_channels, height, width)`.

    Raises:
        ValueError: If the images are not floating-point numbers, have a wrong number of channels, or have a height or width that
            cannot be halved between all levels.
    """
    check_images("sample", sample, in_channels)
    factor = 2 ** (num_levels - 1)
    height, width = sample.shape[2:]
    if height % factor or width % factor:
        raise ValueError(f"Height and width must be multiples of {factor}, but got {height}x{width}.")
