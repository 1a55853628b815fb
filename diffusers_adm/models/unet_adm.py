"""UNet of ADM (Dhariwal & Nichol 2021, arXiv 2105.05233, section 3)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.utils import BaseOutput
from torch import nn

from diffusers_adm.checks import as_numbers, check_images, one_per_image, one_per_level
from diffusers_adm.models.adapters import AdapterMixin, without_adapters
from diffusers_adm.models.blocks import (
    RESAMPLE_TYPES,
    ADMBlockFactory,
    ADMConfigMixin,
    ADMEncoder,
    ADMGroupNorm,
    ADMTimeEmbedding,
    ADMUpBlock,
    ADMUpsample2D,
    check_sample,
    zero_init,
)
from diffusers_adm.models.preconditioning import Preconditioning
from diffusers_adm.models.weights import CompleteWeightsMixin
from diffusers_adm.openai.checkpoints import PublishedCheckpoint
from diffusers_adm.openai.files import Checkpoint
from diffusers_adm.openai.tensors import to_published
from diffusers_adm.quiet import QuietCastMixin


@dataclass
class ADMUNet2DOutput(BaseOutput):
    """
    Output of [`ADMUNet2DModel`].

    Args:
        sample: Prediction, `(batch, out_channels, height, width)`. The first `in_channels` channels predict the noise, or x_0 if
            the scheduler's `prediction_type` is `"sample"` or the model has preconditioning. With learned variance, `in_channels`
            more channels follow. They interpolate the log-variance: -1 is its lower bound, and 1 is its upper bound.
    """

    sample: torch.Tensor


def build_decoder(
    blocks: ADMBlockFactory,
    skip_channels: list[int],
    layers_per_block: int | tuple[int, ...],
    upsample_type: str,
) -> nn.ModuleList:
    """
    Builds the decoder, with one block per skip connection. Its first block takes the last skip connection.

    Args:
        blocks: Builder of the model's blocks.
        skip_channels: Number of channels of each skip connection, in the order in which the encoder makes them.
        layers_per_block: Number of residual blocks per level of the encoder, one for all levels or one per level.
        upsample_type: Kind of upsampling: `"resnet"` or `"conv"`.
    """
    up_blocks, skip_channels = nn.ModuleList(), list(skip_channels)
    channels = blocks.channels[-1]
    layers = one_per_level("layers_per_block", layers_per_block, len(blocks.channels))
    for level in reversed(range(len(blocks.channels))):
        for layer in range(layers[level] + 1):
            resnet = blocks.resnet(channels + skip_channels.pop(), blocks.channels[level])
            channels = blocks.channels[level]
            upsampler = None
            if level > 0 and layer == layers[level]:
                is_resnet = upsample_type == "resnet"
                upsampler = blocks.resnet(channels, channels, "up") if is_resnet else ADMUpsample2D(channels)
            # Attention is built after the upsampler, because the initial weights that a seed gives depend on the order.
            up_blocks.append(ADMUpBlock(resnet, attention=blocks.attention_at(level), upsampler=upsampler))
    return up_blocks


class ADMUNet2DModel(QuietCastMixin, CompleteWeightsMixin, AdapterMixin, ModelMixin, ADMConfigMixin, AttentionMixin):
    r"""
    UNet of "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233, section 3): residual blocks with adaptive
    group normalisation, multi-resolution attention, and BigGAN up- and downsampling. The defaults describe the released
    class-conditional 64x64 model. Every ablation of the paper's Tables 1 to 3 is one argument.

    Args:
        sample_size: Height and width of the images in pixels. `forward` supports all sizes that can be halved between all levels.
        in_channels: Number of channels of the image.
        out_channels: Number of channels of the output: `in_channels`, or `2 * in_channels` for a learned variance (Nichol &
            Dhariwal 2021, eq. 15).
        model_channels: Base width, which is multiplied by `channel_mult`.
        channel_mult: Width of each level, highest resolution first, as multiples of `model_channels`.
        layers_per_block: Number of residual blocks per level, one for all levels or one per level. The decoder has one more.
        attention_resolutions: Resolutions with self-attention, in pixels of a `sample_size` image.
        attention_head_dim: Number of channels per attention head. `None` if `num_attention_heads` is given.
        num_attention_heads: Number of heads of every attention layer. `None` if `attention_head_dim` is given.
        norm_num_groups: Number of groups of the group normalisation.
        num_class_embeds: Number of classes. `None` for an unconditional model.
        use_null_class: Whether the class embedding has one more row, with index `num_class_embeds`, for the null class, which stands
            for "no class" (Ho & Salimans 2022).
        low_res_conditioning: Whether the model is an upsampler, whose second input is a low-resolution image with the same number
            of channels.
        dropout: Dropout probability of the residual blocks.
        resnet_time_scale_shift: Use of the embedding in residual blocks: `"scale_shift"` (AdaGN) or `"default"` (added).
        downsample_type: Kind of downsampling: `"resnet"` (a BigGAN residual block) or `"conv"` (a strided convolution).
        upsample_type: Kind of upsampling: `"resnet"` (a BigGAN residual block) or `"conv"` (nearest neighbours, then a
            convolution).
        output_scale_factor: Divisor of every residual sum. `2 ** 0.5` is the paper's residual rescaling.
        timestep_scale: Factor by which the timestep is multiplied before it is embedded. It is `1000 / num_train_timesteps` for a
            model that was trained with rescaled timesteps (`--rescale_timesteps True` in the original code).
        preconditioning: Kind of preconditioning of a model that is given the noise level sigma and predicts x_0: `"edm"`
            (Karras et al. 2022, arXiv 2206.00364) or `"consistency"` (Song et al. 2023, arXiv 2303.01469). `None` for a
            model that is given the timestep.
        sigma_data: Standard deviation of the clean images, for the preconditioning.
        sigma_min: Lowest noise level of a model with preconditioning.
        sigma_max: Highest noise level of a model with preconditioning.
        beta_schedule: Noise schedule of diffusers, for a network with preconditioning that began as one without. It is given the
            timestep with the noise level sigma, interpolated. `None` for a network that is given log(sigma) / 4.
        num_train_timesteps: Number of timesteps of `beta_schedule`.

    Raises:
        ValueError: If the arguments do not describe a model.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ADMResnetBlock2D", "ADMAttentionBlock", "ADMUpBlock"]
    # Residual blocks are left out: they have about twenty widths, and torch compiles one graph per width, but at most eight.
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
        layers_per_block: int | tuple[int, ...] = 3,
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
        timestep_scale: float = 1.0,
        preconditioning: str | None = None,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        beta_schedule: str | None = None,
        num_train_timesteps: int = 1000,
    ):
        super().__init__()
        if out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(
                f"`out_channels` must be {in_channels} (`in_channels`), or {2 * in_channels} with learned variance, but got"
                f" out_channels={out_channels}."
            )
        if preconditioning is not None and out_channels != in_channels:
            raise ValueError(
                f"preconditioning={preconditioning!r} requires out_channels={in_channels}, because it does not support a learned"
                f" variance, but got {out_channels}."
            )
        if beta_schedule is not None and preconditioning is None:
            raise ValueError(f"beta_schedule={beta_schedule!r} requires a `preconditioning`, but got None.")
        if use_null_class and num_class_embeds is None:
            raise ValueError("use_null_class=True requires a class-conditional model, but num_class_embeds is None.")
        if num_class_embeds is not None and num_class_embeds < 1:
            raise ValueError(f"`num_class_embeds` must be at least 1, or None, but got {num_class_embeds}.")
        if upsample_type not in RESAMPLE_TYPES:
            raise ValueError(f"`upsample_type` must be one of {RESAMPLE_TYPES}, but got {upsample_type!r}.")
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
        self.gradient_checkpointing = False
        self.preconditioner = None
        if preconditioning is not None:
            levels = (sigma_data, sigma_min, sigma_max)
            self.preconditioner = Preconditioning(preconditioning, *levels, beta_schedule, num_train_timesteps)

        # 1. Embeddings
        self.time_embedding = ADMTimeEmbedding(model_channels, timestep_scale)
        self.class_embedding = None
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds + use_null_class, blocks.emb_channels)

        # 2. Encoder and middle
        encoder_channels = 2 * in_channels if low_res_conditioning else in_channels
        self.encoder = ADMEncoder(
            blocks,
            in_channels=encoder_channels,
            layers_per_block=layers_per_block,
            downsample_type=downsample_type,
        )

        # 3. Decoder
        self.up_blocks = build_decoder(
            blocks,
            skip_channels=self.encoder.skip_channels,
            layers_per_block=layers_per_block,
            upsample_type=upsample_type,
        )

        # 4. Output
        channels = blocks.channels[0]
        self.norm_out = ADMGroupNorm(norm_num_groups, channels)
        self.act = nn.SiLU()
        self.conv_out = zero_init(nn.Conv2d(channels, out_channels, 3, padding=1))

    @classmethod
    def from_openai(
        cls,
        checkpoint: Checkpoint | PublishedCheckpoint,
        flags: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "ADMUNet2DModel":
        """
        Builds the UNet or upsampler of a checkpoint of the original code, in eval mode.

        Args:
            checkpoint: Path of the file, its state dict, or a `PublishedCheckpoint`. Tensors keep their device. The model shares no
                memory with a state dict.
            flags: Model flags of the original command line, as one string. Most of the architecture is inferred from tensor
                shapes, and the given flags are checked against them. Released files are recognised by name and need no flags.
            dtype: Data type of the weights. `None` keeps the data type of the checkpoint.

        Raises:
            ValueError: If the file cannot be read, is not a UNet of the original code or contradicts the flags, or `dtype` is not
                a floating-point type.
        """
        return PublishedCheckpoint.of(checkpoint, flags).load(cls, "UNet", dtype)

    def to_openai_state_dict(self, use_new_attention_order: bool = False) -> dict[str, torch.Tensor]:
        """
        Converts the weights back to the names and layouts of the original code. Adapters are merged into them.

        Args:
            use_new_attention_order: Value of `--use_new_attention_order` that you will pass to the original code.

        Raises:
            ValueError: If the original code has no such model.
        """
        return to_published(without_adapters(self).state_dict(), self.config, use_new_attention_order)

    @property
    def learns_variance(self) -> bool:
        """Whether the model has a learned variance, which is the second half of the output's channels."""
        return self.config.out_channels == 2 * self.config.in_channels

    @property
    def null_class(self) -> int | None:
        """Label that stands for "no class". `None` for a model without a null class."""
        return self.config.num_class_embeds if self.config.use_null_class else None

    def epsilon_view(self, class_labels: torch.Tensor | None = None) -> "EpsilonView":
        """
        Returns a view of the model without its learned variance, for callers that do not expect one, such as solvers of inverse
        problems. Stock schedulers support its output. A `DDPMScheduler` must then have a fixed `variance_type`.

        Args:
            class_labels: Class of each image, `(batch,)`, for callers that pass no labels.

        Raises:
            ValueError: If the model has preconditioning.
        """
        if self.preconditioner is not None:
            raise ValueError(
                "`epsilon_view` requires a model that predicts the noise, but this model predicts x_0"
                f" (preconditioning={self.config.preconditioning!r})."
            )
        return EpsilonView(self, class_labels)

    def _check_inputs(
        self, sample: torch.Tensor, class_labels: torch.Tensor | None, low_res: torch.Tensor | None
    ) -> None:
        check_sample(sample, self.config.in_channels, len(self.config.channel_mult))
        if self.class_embedding is None and class_labels is not None:
            raise ValueError(
                "`class_labels` were given to an unconditional model (num_class_embeds=None). Leave them out."
            )
        if self.class_embedding is not None and class_labels is None and self.null_class is None:
            raise ValueError(
                "`class_labels` are required, because the model has classes and no null class, but got None."
            )
        if low_res is None and self.config.low_res_conditioning:
            raise ValueError("`low_res` is required, because the model is an upsampler, but got None.")
        if low_res is not None and not self.config.low_res_conditioning:
            raise ValueError(
                "`low_res` requires an upsampler (low_res_conditioning=True). Leave it out for this model."
            )
        if low_res is not None:
            check_images("low_res", low_res, self.config.in_channels)
            if low_res.shape[0] != sample.shape[0]:
                raise ValueError(
                    f"`low_res` must have as many images as `sample`, {sample.shape[0]}, but got {low_res.shape[0]}."
                )

    def _embed_classes(self, class_labels: torch.Tensor | None, sample: torch.Tensor) -> torch.Tensor:
        """Returns the embedding of each image's class, `(batch or 1, 4 * model_channels)`."""
        if class_labels is None:
            class_labels = torch.full((sample.shape[0],), self.null_class, device=sample.device)  # (batch,)
        class_labels = one_per_image("class_labels", class_labels, sample)
        if class_labels.is_floating_point():
            raise ValueError(f"`class_labels` must be integers, but got {class_labels.dtype}.")
        try:
            return self.class_embedding(class_labels.long())
        except IndexError as error:  # only on the CPU, because reading labels on a GPU would wait for it
            last = self.class_embedding.num_embeddings - 1
            raise ValueError(f"`class_labels` must be in [0, {last}], but got {class_labels.tolist()}.") from error

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> ADMUNet2DOutput | tuple[torch.Tensor]:
        """
        Predicts the noise or x_0, and the variance if it is learned. A model with preconditioning predicts x_0.

        Args:
            sample: Noised images, `(batch, in_channels, height, width)`. With preconditioning they are x_0 + sigma * epsilon, and
                float32 images keep their precision even if the weights are in half precision.
            timestep: Training timestep of each image, `(batch,)`, or one for all. With preconditioning, it is the noise level
                sigma, above 0.
            class_labels: Class of each image, `(batch,)`. `None` for an unconditional model, or for the null class.
            low_res: Low-resolution images of an upsampler, `(batch, in_channels, any height, any width)`.
            return_dict: Whether to return an [`ADMUNet2DOutput`] instead of a tuple.

        Raises:
            ValueError: If labels or low-resolution images are missing or not supported, an argument has a wrong type or shape,
                height and width cannot be halved between all levels, or a label on the CPU is out of range.
        """
        self._check_inputs(sample, class_labels, low_res)
        if self.preconditioner is None:
            output = self._network(sample, timestep, class_labels, low_res)  # (batch, out_channels, height, width)
        else:
            output = self._denoised(sample, timestep, class_labels, low_res)  # (batch, in_channels, height, width)
        return ADMUNet2DOutput(sample=output) if return_dict else (output,)

    def _denoised(
        self,
        sample: torch.Tensor,
        sigma: torch.Tensor | float | int,
        class_labels: torch.Tensor | None,
        low_res: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns D(x; sigma), the predicted x_0 [Karras et al. 2022, eq. 7], in the dtype of x."""
        precise = torch.float64 if sample.dtype == torch.float64 else torch.float32
        sigma = one_per_image("timestep", sigma, sample).expand(sample.shape[0]).to(precise)  # (batch,)
        level, scales = sigma[:, None, None, None], self.preconditioner  # (batch, 1, 1, 1)
        x = sample.to(precise)  # (batch, in_channels, height, width)
        model_input = (scales.c_in(level) * x).to(self.dtype)  # (batch, in_channels, height, width)
        model_output = self._network(model_input, scales.c_noise(sigma), class_labels, low_res)  # F
        return (scales.c_skip(level) * x + scales.c_out(level) * model_output.to(precise)).to(sample.dtype)

    def _network(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None,
        low_res: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns the output of the layers, `(batch, out_channels, height, width)`."""
        # 1. Embeddings
        emb = self.time_embedding(sample, timestep)  # (batch, 4 * model_channels)
        if self.class_embedding is not None:
            emb = emb + self._embed_classes(class_labels, sample).to(emb.dtype)  # (batch, 4 * model_channels)

        # 2. Encoder and middle
        if low_res is not None:
            low_res = F.interpolate(low_res, sample.shape[2:], mode="bilinear")  # (batch, in_channels, height, width)
            sample = torch.cat([sample, low_res.to(sample.dtype)], dim=1)  # (batch, 2 * in_channels, height, width)
        hidden_states, skips = self.encoder(sample, emb)  # (batch, channels, height / 2**k, width / 2**k)

        # 3. Decoder
        for block in self.up_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, skips.pop(), emb)
            else:
                hidden_states = block(
                    hidden_states, skips.pop(), emb
                )  # (batch, channels, height / 2**k, width / 2**k)

        # 4. Output
        hidden_states = self.act(self.norm_out(hidden_states))  # (batch, channels, height, width)
        return self.conv_out(hidden_states)  # (batch, out_channels, height, width)


class EpsilonView(nn.Module):
    """
    View of a UNet without its learned variance. The output of the view has as many channels as the image. View and UNet share their
    weights, and their configs differ only in `out_channels`.

    Args:
        unet: UNet to wrap.
        class_labels: Class of each image, `(batch,)`, for calls without labels.
    """

    def __init__(self, unet: ADMUNet2DModel, class_labels: torch.Tensor | None = None):
        super().__init__()
        self.unet = unet
        if class_labels is not None:
            class_labels = as_numbers("class_labels", class_labels).to(unet.device)
        self.register_buffer("class_labels", class_labels, persistent=False)
        self.config = FrozenDict({**unet.config, "out_channels": unet.config.in_channels})

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.unet.device

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> ADMUNet2DOutput | tuple[torch.Tensor]:
        """Predicts the noise, or x_0. The arguments are those of [`ADMUNet2DModel.forward`]."""
        labels = self.class_labels if class_labels is None else class_labels  # (batch,)
        output = self.unet(sample, timestep, labels, low_res).sample  # (batch, out_channels, height, width)
        sample = output[:, : self.config.out_channels]  # (batch, in_channels, height, width)
        return ADMUNet2DOutput(sample=sample) if return_dict else (sample,)
