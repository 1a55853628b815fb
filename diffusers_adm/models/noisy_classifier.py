"""Noise-aware classifier that guides ADM (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4.3)."""

from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.utils import BaseOutput
from torch import nn

from diffusers_adm.choices import POOLS
from diffusers_adm.models.adapters import AdapterMixin, without_adapters
from diffusers_adm.models.blocks import (
    ADMAttention,
    ADMBlockFactory,
    ADMConfigMixin,
    ADMEncoder,
    ADMGroupNorm,
    ADMTimeEmbedding,
    check_sample,
    zero_init,
)
from diffusers_adm.models.class_names import numbered_names
from diffusers_adm.models.weights import CompleteWeightsMixin
from diffusers_adm.openai.checkpoints import PublishedCheckpoint
from diffusers_adm.openai.files import Checkpoint
from diffusers_adm.openai.tensors import to_published
from diffusers_adm.quiet import QuietCastMixin


SPATIAL_POOL_CHANNELS = 2048


@dataclass
class NoisyClassifierOutput(BaseOutput):
    """
    Output of [`NoisyClassifier`].

    Args:
        logits: Logits before the softmax, `(batch, num_classes)`.
    """

    logits: torch.Tensor


class ADMAttentionPool(nn.Module):
    """
    Attention pooling of CLIP: self-attention over all positions and one additional token, the mean of the positions. The output at the
    additional token is the logits.
    """

    def __init__(self, resolution: int, channels: int, heads: int, num_classes: int):
        super().__init__()
        self.resolution = resolution
        self.positional_embedding = nn.Parameter(torch.randn(resolution**2 + 1, channels) / channels**0.5)
        self.attn = ADMAttention(channels, heads, out_channels=num_classes)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.shape[2:] != (self.resolution, self.resolution):
            height, width = hidden_states.shape[2:]
            raise ValueError(
                "pool='attention' requires images of the model's `sample_size`, whose features are"
                f" {self.resolution}x{self.resolution}, but got features of {height}x{width}."
            )
        tokens = hidden_states.flatten(2).transpose(1, 2)  # (batch, height * width, channels)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)  # (batch, 1 + height * width, channels)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)  # (batch, 1 + height * width, channels)
        return self.attn(tokens)[:, 0]  # (batch, num_classes)


class ADMAveragePool(nn.Module):
    """Mean over all positions and a linear layer (pool "adaptive")."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.fc = zero_init(nn.Linear(channels, num_classes))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc(hidden_states.mean(dim=(2, 3)))  # (batch, num_classes)


class ADMSpatialPool(nn.Module):
    """Means over all positions after every block of the encoder and two linear layers (pools "spatial[_v2]")."""

    def __init__(self, channels: int, num_classes: int, norm_num_groups: int | None):
        super().__init__()
        self.fc1 = nn.Linear(channels, SPATIAL_POOL_CHANNELS)
        self.norm = ADMGroupNorm(norm_num_groups, SPATIAL_POOL_CHANNELS) if norm_num_groups else nn.Identity()
        self.act = nn.SiLU() if norm_num_groups else nn.ReLU()
        self.fc2 = nn.Linear(SPATIAL_POOL_CHANNELS, num_classes)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        means = torch.cat([feature.mean(dim=(2, 3)) for feature in features], dim=1)  # (batch, sum of channels)
        return self.fc2(self.act(self.norm(self.fc1(means))))  # (batch, num_classes)


class NoisyClassifier(QuietCastMixin, CompleteWeightsMixin, AdapterMixin, ModelMixin, ADMConfigMixin, AttentionMixin):
    r"""
    Classifier of noised images. It predicts p(y | x_t) from x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon and the
    timestep t. It consists of the encoder of [`ADMUNet2DModel`] and a pooling head (arXiv 2105.05233, section 4.3). The defaults
    describe the released 64x64 classifier.

    Args:
        sample_size: Height and width of the images in pixels. With `pool="attention"`, the model supports no other size.
        in_channels: Number of channels of the image.
        num_classes: Number of classes.
        pool: Kind of pooling head. `"attention"` pools the last features by attention, and `"adaptive"` takes their mean.
            `"spatial"` passes the means of all blocks' features through two linear layers. `"spatial_v2"` does the same with a
            normalisation between the two layers.
        model_channels: Base width, which is multiplied by `channel_mult`.
        channel_mult: Width of each level, highest resolution first, as multiples of `model_channels`.
        layers_per_block: Number of residual blocks per level, one for all levels or one per level.
        attention_resolutions: Resolutions with self-attention, in pixels of a `sample_size` image.
        attention_head_dim: Number of channels per attention head. `None` if `num_attention_heads` is given.
        num_attention_heads: Number of heads of every attention layer. `None` if `attention_head_dim` is given.
        norm_num_groups: Number of groups of the group normalisation.
        dropout: Dropout probability of the residual blocks.
        resnet_time_scale_shift: Use of the timestep embedding in residual blocks: `"scale_shift"` (AdaGN) or `"default"` (added).
        downsample_type: Kind of downsampling: `"resnet"` (a BigGAN residual block) or `"conv"` (a strided convolution).
        output_scale_factor: Divisor of every residual sum. `2 ** 0.5` is the paper's residual rescaling.
        timestep_scale: Factor by which the timestep is multiplied before it is embedded. It is `1000 / num_train_timesteps` for a
            model that was trained with rescaled timesteps (`--rescale_timesteps True` in the original code).
        num_train_timesteps: Number of timesteps that the model was trained with. `None` if it is unknown.
        beta_schedule: Noise schedule that the model was trained with, by its name in diffusers. `None` if it is unknown.
        id2label: Name of each class by its number. Synonyms are separated by commas. `None` if the names are unknown.

    Raises:
        ValueError: If the arguments do not describe a model.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ADMResnetBlock2D", "ADMAttentionBlock", "ADMAttentionPool"]
    # Residual blocks are left out: they have about twenty widths, and torch compiles one graph per width, but at most eight.
    _repeated_blocks = ["ADMAttentionBlock"]
    _group_offload_block_modules = ["encoder"]
    _skip_layerwise_casting_patterns = ["norm", "embedding"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
        pool: str = "attention",
        model_channels: int = 128,
        channel_mult: tuple[float, ...] = (1, 2, 3, 4),
        layers_per_block: int | tuple[int, ...] = 4,
        attention_resolutions: tuple[int, ...] = (32, 16, 8),
        attention_head_dim: int | None = 64,
        num_attention_heads: int | None = None,
        norm_num_groups: int = 32,
        dropout: float = 0.0,
        resnet_time_scale_shift: str = "scale_shift",
        downsample_type: str = "resnet",
        output_scale_factor: float = 1.0,
        timestep_scale: float = 1.0,
        num_train_timesteps: int | None = None,
        beta_schedule: str | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"`num_classes` must be at least 1, but got {num_classes}.")
        self.register_to_config(id2label=numbered_names(id2label, num_classes))
        if pool not in POOLS:
            raise ValueError(f"`pool` must be one of {POOLS}, but got {pool!r}.")
        blocks = ADMBlockFactory(
            sample_size=sample_size,
            model_channels=model_channels,
            channel_mult=channel_mult,
            attention_resolutions=attention_resolutions,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            norm_num_groups=norm_num_groups,
            dropout=dropout,
            resnet_time_scale_shift=resnet_time_scale_shift,
            output_scale_factor=output_scale_factor,
        )
        channels = blocks.channels[-1]
        self.time_embedding = ADMTimeEmbedding(model_channels, timestep_scale)
        self.encoder = ADMEncoder(
            blocks,
            in_channels=in_channels,
            layers_per_block=layers_per_block,
            downsample_type=downsample_type,
        )
        if pool in ("attention", "adaptive"):
            self.norm_out = ADMGroupNorm(norm_num_groups, channels)
            self.act = nn.SiLU()
        if pool == "attention":
            self.pooling = ADMAttentionPool(
                resolution=blocks.resolutions[-1],
                channels=channels,
                heads=blocks.heads(channels),
                num_classes=num_classes,
            )
        elif pool == "adaptive":
            self.pooling = ADMAveragePool(channels, num_classes)
        else:
            self.pooling = ADMSpatialPool(
                channels=sum(self.encoder.skip_channels) + channels,
                num_classes=num_classes,
                norm_num_groups=norm_num_groups if pool == "spatial_v2" else None,
            )

    @classmethod
    def from_openai(
        cls,
        checkpoint: Checkpoint | PublishedCheckpoint,
        flags: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "NoisyClassifier":
        """
        Builds the classifier of a checkpoint of the original code, in eval mode.

        Args:
            checkpoint: Path of the file, its state dict, or a `PublishedCheckpoint`. Tensors keep their device. The model shares no
                memory with a state dict.
            flags: Flags `--image_size`, `--channel_mult` and `--classifier_*` of the original command line, as one string.
                Most of the architecture is inferred from tensor shapes, and the given flags are checked against them.
                Released files are recognised by name and need no flags.
            dtype: Data type of the weights. `None` keeps the data type of the checkpoint.

        Raises:
            ValueError: If the file cannot be read, is not a classifier of the original code or contradicts the flags, or
                `dtype` is not a floating-point type.
        """
        return PublishedCheckpoint.of(checkpoint, flags).load(cls, "classifier", dtype)

    def to_openai_state_dict(self) -> dict[str, torch.Tensor]:
        """
        Converts the weights back to the names and layouts of the original code. Adapters are merged into them.

        Raises:
            ValueError: If the original code has no such model.
        """
        return to_published(without_adapters(self).state_dict(), self.config)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> NoisyClassifierOutput | tuple[torch.Tensor]:
        """
        Classifies noised images.

        Args:
            sample: Noised images, `(batch, in_channels, height, width)`.
            timestep: Training timestep per image, `(batch,)`, or one for all.
            return_dict: Whether to return a [`NoisyClassifierOutput`] instead of a tuple.

        Raises:
            ValueError: If the number of channels is wrong, height and width cannot be halved between all levels, or the size is
                not `sample_size` with `pool="attention"`.
        """
        check_sample(sample, self.config.in_channels, len(self.config.channel_mult))
        emb = self.time_embedding(sample, timestep)  # (batch, 4 * model_channels)
        hidden_states, skips = self.encoder(sample, emb)  # (batch, channels, height / 2**k, width / 2**k)
        if self.config.pool in ("attention", "adaptive"):
            logits = self.pooling(self.act(self.norm_out(hidden_states)))  # (batch, num_classes)
        else:
            logits = self.pooling([*skips, hidden_states])  # (batch, num_classes)
        return NoisyClassifierOutput(logits=logits) if return_dict else (logits,)
