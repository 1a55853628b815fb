"""The UNet of ADM (Dhariwal & Nichol 2021, arXiv 2105.05233, section 3)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.utils import BaseOutput
from torch import nn

from diffusers_adm.models.blocks import (
    RESAMPLE_TYPES,
    ADMBlockFactory,
    ADMConfigMixin,
    ADMEncoder,
    ADMGroupNorm,
    ADMTimeEmbedding,
    ADMUpBlock,
    ADMUpsample2D,
    check_images,
    zero_init,
)
from diffusers_adm.openai.checkpoints import PublishedCheckpoint
from diffusers_adm.openai.files import Checkpoint
from diffusers_adm.openai.tensors import to_published
from diffusers_adm.quiet import QuietCastMixin


@dataclass
class ADMUNet2DOutput(BaseOutput):
    """
    Output of [`ADMUNet2DModel`].

    Args:
        sample: `(batch, out_channels, height, width)`. The first `in_channels` predict the noise (or x_0, as the
            scheduler's `prediction_type` says); with learned variance as many more follow, which interpolate the
            log-variance between its bounds (-1 is the lower, 1 the upper).
    """

    sample: torch.Tensor


class ADMUNet2DModel(QuietCastMixin, ModelMixin, ADMConfigMixin, AttentionMixin):
    r"""
    The UNet of "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233, section 3): residual blocks with
    adaptive group normalisation, multi-resolution attention and BigGAN up- and downsampling. The defaults are the
    released class-conditional 64x64 model; every ablation of the paper's Tables 1 to 3 is one argument.

    Args:
        sample_size: Height and width that the model is made for, in pixels. `forward` takes any size that the
            downsampling divides.
        in_channels: Channels of the image.
        out_channels: `in_channels`, or twice as many to learn the variance (Nichol & Dhariwal 2021, eq. 15).
        model_channels: Width that `channel_mult` multiplies.
        channel_mult: Width of each level, highest resolution first, as multiples of `model_channels`.
        layers_per_block: Residual blocks a level (one more in the decoder).
        attention_resolutions: Resolutions with self-attention, in pixels of a `sample_size` image.
        attention_head_dim: Channels a head; the alternative to `num_attention_heads`.
        num_attention_heads: Heads of every attention layer; the alternative to `attention_head_dim`.
        norm_num_groups: Groups of the group normalisation.
        num_class_embeds: Number of classes; `None` for an unconditional model.
        use_null_class: Adds to the class embedding one row, of index `num_class_embeds`, which stands for "no class"
            (Ho & Salimans 2022).
        low_res_conditioning: Takes a low-resolution image of the same number of channels as second input (upsampler).
        dropout: Dropout probability of the residual blocks.
        resnet_time_scale_shift: `"scale_shift"` (AdaGN) or `"default"` (the embedding is added).
        downsample_type: `"resnet"` (a BigGAN residual block) or `"conv"` (a strided convolution).
        upsample_type: `"resnet"` or `"conv"` (nearest neighbours, then a convolution).
        output_scale_factor: What every residual sum is divided by; `2 ** 0.5` is the paper's residual rescaling.

    Raises:
        ValueError: If the arguments do not describe a model.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ADMResnetBlock2D", "ADMAttentionBlock", "ADMUpBlock"]
    # Residual blocks come in some twenty widths, and each would be a graph of its own: beyond torch's limit of eight.
    _repeated_blocks = ["ADMAttentionBlock"]
    _group_offload_block_modules = ["encoder"]
    _skip_layerwise_casting_patterns = ["norm", "embedding"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 6,
        model_channels: int = 192,
        channel_mult: tuple[float, ...] = (1, 2, 3, 4),
        layers_per_block: int = 3,
        attention_resolutions: tuple[int, ...] = (32, 16, 8),
        attention_head_dim: int | None = 64,
        num_attention_heads: int | None = None,
        norm_num_groups: int = 32,
        num_class_embeds: int | None = 1000,
        use_null_class: bool = False,
        low_res_conditioning: bool = False,
        dropout: float = 0.1,
        resnet_time_scale_shift: str = "scale_shift",
        downsample_type: str = "resnet",
        upsample_type: str = "resnet",
        output_scale_factor: float = 1.0,
    ):
        super().__init__()
        if out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(
                f"out_channels={out_channels} is neither in_channels={in_channels} nor twice that (learned variance)."
            )
        if use_null_class and num_class_embeds is None:
            raise ValueError("use_null_class=True needs a class-conditional model: num_class_embeds is None.")
        if num_class_embeds is not None and num_class_embeds < 1:
            raise ValueError(f"num_class_embeds must be at least 1, or None: got {num_class_embeds}.")
        if upsample_type not in RESAMPLE_TYPES:
            raise ValueError(f"upsample_type={upsample_type!r} is not one of {RESAMPLE_TYPES}.")
        blocks = ADMBlockFactory(
            sample_size,
            model_channels,
            channel_mult,
            attention_resolutions,
            attention_head_dim,
            num_attention_heads,
            norm_num_groups,
            dropout,
            resnet_time_scale_shift,
            output_scale_factor,
        )
        self.gradient_checkpointing = False

        # 1. Embeddings
        self.time_embedding = ADMTimeEmbedding(model_channels)
        self.class_embedding = None
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds + use_null_class, blocks.emb_channels)

        # 2. Encoder and middle
        encoder_channels = 2 * in_channels if low_res_conditioning else in_channels
        self.encoder = ADMEncoder(blocks, encoder_channels, layers_per_block, downsample_type)

        # 3. Decoder: one block for each skip connection, the last made first
        self.up_blocks = nn.ModuleList()
        skip_channels = list(self.encoder.skip_channels)
        channels = blocks.channels[-1]
        for level in reversed(range(len(channel_mult))):
            for layer in range(layers_per_block + 1):
                resnet = blocks.resnet(channels + skip_channels.pop(), blocks.channels[level])
                channels = blocks.channels[level]
                upsampler = None
                if level > 0 and layer == layers_per_block:
                    upsampler = (
                        blocks.resnet(channels, channels, resample="up")
                        if upsample_type == "resnet"
                        else ADMUpsample2D(channels)
                    )
                self.up_blocks.append(ADMUpBlock(resnet, blocks.attention_at(level), upsampler))

        # 4. Output
        self.norm_out = ADMGroupNorm(norm_num_groups, channels)
        self.act = nn.SiLU()
        self.conv_out = zero_init(nn.Conv2d(channels, out_channels, 3, padding=1))

    @classmethod
    def from_openai(cls, checkpoint: Checkpoint | PublishedCheckpoint, flags: str | None = None) -> "ADMUNet2DModel":
        """
        Builds the UNet or upsampler of a checkpoint of the original code, in eval mode.

        Args:
            checkpoint: Path of the file, or its state dict. Tensors keep dtype and device, and are copied only where
                their layout differs.
            flags: Model flags of the original command line, as one string. Shapes tell most of a model, and the given
                flags are checked against them. Released files, which are recognised by name, need none.

        Raises:
            ValueError: If the file cannot be read, the flags contradict it, or it is not that of a published UNet.
        """
        return PublishedCheckpoint.of(checkpoint, flags).load(cls, "UNet")

    def to_openai_state_dict(self, use_new_attention_order: bool = False) -> dict[str, torch.Tensor]:
        """
        Converts the weights back to the names and layouts of the original code.

        Args:
            use_new_attention_order: Flag of the original code with this name, for which the tensors are laid out.

        Raises:
            ValueError: If the original code has no such model.
        """
        return to_published(self.state_dict(), self.config, use_new_attention_order)

    @property
    def learns_variance(self) -> bool:
        """Whether the output holds a second set of channels, for the variance."""
        return self.config.out_channels == 2 * self.config.in_channels

    @property
    def null_class(self) -> int | None:
        """The label that stands for "no class"; `None` for a model without one."""
        return self.config.num_class_embeds if self.config.use_null_class else None

    def epsilon_view(self, class_labels: torch.Tensor | None = None) -> "EpsilonView":
        """
        The same network for callers that know no learned variance, such as solvers of inverse problems. Stock schedulers take
        its output as they are, but for a `DDPMScheduler`, whose `variance_type` must be a fixed one.

        Args:
            class_labels: Class of each image, where they do not know of classes either.
        """
        return EpsilonView(self, class_labels)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> ADMUNet2DOutput | tuple[torch.Tensor]:
        """
        Args:
            sample: Noised images, `(batch, in_channels, height, width)`.
            timestep: Training timestep of each image, `(batch,)`, or one for all.
            class_labels: Class of each image, `(batch,)`. `None` for an unconditional model, or to run a model that
                has a null class without a class.
            low_res: Low-resolution images, `(batch, in_channels, any height, any width)`, for an upsampler only.
            return_dict: Whether to return an [`ADMUNet2DOutput`] instead of a tuple.

        Raises:
            ValueError: If labels or low-resolution images are missing or not taken, or if the image has another number of
                channels or cannot be halved between all levels.
        """
        check_images(sample, self.config.in_channels, len(self.config.channel_mult))
        if self.class_embedding is None and class_labels is not None:
            raise ValueError("class_labels were given to an unconditional model (num_class_embeds=None).")
        if self.class_embedding is not None and class_labels is None and self.null_class is None:
            raise ValueError("class_labels are missing: the model is class-conditional and has no null class.")
        if (low_res is not None) != self.config.low_res_conditioning:
            raise ValueError(
                f"low_res must be given if and only if low_res_conditioning is True: it is"
                f" {self.config.low_res_conditioning}, and low_res is {'missing' if low_res is None else 'given'}."
            )

        # 1. Embeddings
        emb = self.time_embedding(sample, timestep)  # (batch, 4 * model_channels)
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full((sample.shape[0],), self.null_class, device=sample.device)
            emb = emb + self.class_embedding(class_labels).to(emb.dtype)  # (batch, 4 * model_channels)

        # 2. Encoder and middle
        if low_res is not None:
            low_res = F.interpolate(low_res, sample.shape[2:], mode="bilinear")
            sample = torch.cat([sample, low_res.to(sample.dtype)], dim=1)  # (batch, 2 * in_channels, height, width)
        hidden_states, skips = self.encoder(sample, emb)  # (batch, channels, height / 2**k, width / 2**k)

        # 3. Decoder
        for block in self.up_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, skips.pop(), emb)
            else:
                hidden_states = block(hidden_states, skips.pop(), emb)

        # 4. Output
        hidden_states = self.act(self.norm_out(hidden_states))  # (batch, channels, height, width)
        sample = self.conv_out(hidden_states)  # (batch, out_channels, height, width)

        return ADMUNet2DOutput(sample=sample) if return_dict else (sample,)


class EpsilonView(nn.Module):
    """
    What a UNet predicts, without the variance: its output has as many channels as the image. It shares the weights, and
    its `config` says the same but for `out_channels`.

    Args:
        unet: Of which.
        class_labels: Class of each image, `(batch,)`, where a call gives none.
    """

    def __init__(self, unet: ADMUNet2DModel, class_labels: torch.Tensor | None = None):
        super().__init__()
        self.unet = unet
        if class_labels is not None:
            class_labels = class_labels.to(unet.device)
        self.register_buffer("class_labels", class_labels, persistent=False)
        self.config = FrozenDict({**unet.config, "out_channels": unet.config.in_channels})

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.unet.device

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> ADMUNet2DOutput | tuple[torch.Tensor]:
        """Arguments as of the UNet."""
        labels = self.class_labels if class_labels is None else class_labels
        output = self.unet(sample, timestep, labels, low_res).sample  # (batch, out_channels, height, width)
        sample = output[:, : self.config.out_channels]  # (batch, in_channels, height, width)
        return ADMUNet2DOutput(sample=sample) if return_dict else (sample,)
