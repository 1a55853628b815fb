"""Options of the training scripts, in groups.

Each field has a help text and a check (see `diffusers_adm.options`), and up to three notes:

- `resumable` says whether a resumed run may change the option. It may be a function of all values. Options that are not resumable
  decide what is trained, or the order of the images.
- `on_card` says whether model cards show the option. It may be a function of all values. By default, they show the options that are
  not resumable.
- `saved` is `False` for options that checkpoints do not store.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from diffusers_adm.choices import BETA_SCHEDULES, POOLS
from diffusers_adm.data.options import ImageFormat, ImageSelection, ImageSource
from diffusers_adm.options import Check, above, at_least, comma_separated, in_range, option, option_group
from diffusers_adm.training.objective_options import NoiseLevelOptions, ObjectiveOptions, check_objective
from diffusers_adm.training.output_options import HubOptions, OutputOptions


MIXED_PRECISIONS = ("no", "fp16", "bf16")
# Schedules of diffusers that need no arguments of their own. The two constant ones are the same here.
LR_SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
RATE = Check("in [0, 1)", lambda rate: 0 <= rate < 1)


PRESET_KINDS = ("classifier", "upsampler")


def preset_names(kind: str | None = None) -> list[str]:
    """
    Returns the names of the presets that ship with this package.

    Args:
        kind: `"classifier"`, `"upsampler"`, or `"unet"` for all others. `None` means all presets.
    """
    folder = resources.files("diffusers_adm.training") / "presets"
    names = sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    kinds = {name: prefix if (prefix := name.split("-")[0]) in PRESET_KINDS else "unet" for name in names}
    return [name for name in names if kind in (None, kinds[name])]


def preset_option(kind: str | None = None) -> Any:
    """Makes the option `--preset` for one kind of model."""
    return option(
        None,
        help=f"Preset that sets the defaults of all options. Choices: {', '.join(preset_names(kind))}.",
        choices=preset_names(kind),
        metavar="NAME",
        resumable=True,
    )


def batch_is_divided_anew(values: dict) -> bool:
    """Returns whether a resumed run may divide its batch among a different number of processes."""
    return values["total_batch_size"] is not None


def number_or_numbers(text: str) -> int | tuple[int, ...]:
    """Parses one integer, or several that are separated by commas."""
    numbers = comma_separated(int)(text)
    return numbers[0] if len(numbers) == 1 else numbers


number_or_numbers.__name__ = comma_separated(int).__name__  # for the message on other texts


@dataclass
class ArchitectureOptions:
    """Architecture of the model, and the model that training starts from."""

    model_channels: int = option(128, help="Number of channels at the largest resolution.", check=at_least(1))
    channel_mult: tuple[float, ...] = option(
        (1, 2, 3, 4),
        help="Factors of the number of channels, one per resolution.",
        check=Check("one or more factors above 0", lambda factors: factors and min(factors) > 0),
    )
    layers_per_block: int | tuple[int, ...] = option(
        2,
        help="Number of residual blocks per resolution, one for all or one per resolution, such as 1,2,2,3.",
        parse=number_or_numbers,
        metavar="INT,...",
        check=Check("at least 1", lambda layers: min(layers if isinstance(layers, tuple) else [layers]) >= 1),
    )
    attention_resolutions: tuple[int, ...] = option((32, 16, 8), help="Resolutions with self-attention, in pixels.")
    attention_head_dim: int = option(64, help="Number of channels per attention head.", check=at_least(1))
    num_attention_heads: int | None = option(
        None,
        help="Number of attention heads. It takes the place of --attention_head_dim.",
        unset="as --attention_head_dim implies",
        check=at_least(1),
    )
    norm_num_groups: int = option(
        32, help="Number of groups of each group normalisation. Each should have several channels.", check=at_least(1)
    )
    resnet_time_scale_shift: str = option(
        "scale_shift",
        help="Use of the timestep in residual blocks: as scale and shift, or as an addend (default).",
        choices=("scale_shift", "default"),
    )
    resample_type: str = option(
        "resnet",
        help="Layers that change the resolution: residual blocks or convolutions.",
        choices=("resnet", "conv"),
    )
    output_scale_factor: float = option(
        1.0, help="Divisor of each residual sum. The ablation of the paper uses 1.4142.", check=above(0)
    )
    dropout: float = option(0.0, help="Dropout probability.", check=in_range(0, 1))
    gradient_checkpointing: bool = option(
        False, help="Compute activations again in the backward pass, to save memory.", resumable=True
    )
    timestep_scale: float = option(1.0, help="Factor on the timesteps that the model is told.", check=above(0))
    pretrained_model_name_or_path: str | None = option(
        None,
        help="Model to start from: a folder of a pipeline or model, a Hub id, released:NAME, shipped:NAME (such as"
        " shipped:adm-cifar-32), or a .pt file of the original code. Without --preset and --model_channels, architecture, resolution"
        " and noise schedule are those of the model. Classes, channels and resolution may differ.",
        unset="random weights",
        metavar="NAME_OR_PATH",
        resumable=True,
    )
    pretrained_subfolder: str | None = option(
        None,
        help="Folder of the model inside a pipeline.",
        unset="unet or classifier",
        metavar="FOLDER",
        resumable=True,
    )
    pretrained_flags: str | None = option(
        None,
        help="Model flags of the original command line, for a .pt file that is not a released checkpoint.",
        resumable=True,
    )
    lora_rank: int | None = option(
        None,
        help="Rank of adapters on attention and convolutions (LoRA), which are trained instead of the weights of the"
        " pretrained model.",
        unset="no adapters",
        check=at_least(1),
    )


@dataclass
class DiffusionOptions:
    """Noise schedule of the training timesteps. It has no effect on a UNet that is given the noise level."""

    noise_schedule: str = option("linear", help="Noise schedule.", choices=BETA_SCHEDULES)
    num_train_timesteps: int = option(1000, help="Number of training timesteps.", check=at_least(1))


@dataclass
class OptimisationOptions:
    """Batches, length, optimizer, precision and seed of a run."""

    train_batch_size: int = option(
        64,
        help="Batch size of one process, in images.",
        check=at_least(1),
        resumable=batch_is_divided_anew,
        on_card=True,
    )
    gradient_accumulation_steps: int = option(
        1,
        help="Number of forward passes per optimizer step.",
        check=at_least(1),
        resumable=batch_is_divided_anew,
        on_card=True,
    )
    total_batch_size: int | None = option(
        None,
        help="Batch size of one optimizer step over all processes, in images. It sets --gradient_accumulation_steps.",
        unset="as the other options imply",
        check=at_least(1),
    )
    max_train_steps: int | None = option(
        None,
        help="Number of optimizer steps. Either this option or --num_epochs is required, and the later one counts.",
        check=at_least(1),
        resumable=True,
        on_card=True,
    )
    num_epochs: int | None = option(
        None,
        help="Number of passes over the images. Either this option or --max_train_steps is required.",
        check=at_least(1),
        resumable=True,
    )
    learning_rate: float = option(1e-4, help="Learning rate.", resumable=True, on_card=True, check=at_least(0))
    lr_scheduler: str = option(
        "constant", help="Learning rate schedule of diffusers.", choices=LR_SCHEDULERS, resumable=True, on_card=True
    )
    lr_warmup_steps: int = option(
        0,
        help="Number of steps during which the learning rate rises from 0.",
        resumable=True,
        on_card=True,
        check=at_least(0),
    )
    adam_beta1: float = option(0.9, help="Decay rate of Adam's mean of gradients.", check=RATE)
    adam_beta2: float = option(0.999, help="Decay rate of Adam's mean of squared gradients.", check=RATE)
    adam_weight_decay: float = option(0.0, help="Weight decay of AdamW.", check=at_least(0))
    adam_epsilon: float = option(1e-8, help="Constant added to Adam's denominator.", check=at_least(0))
    use_8bit_adam: bool = option(False, help="Use AdamW of bitsandbytes, whose state takes 8 bits per value.")
    max_grad_norm: float | None = option(
        None,
        help="Largest norm of the gradient. Larger gradients are scaled down to it.",
        unset="no clipping",
        resumable=True,
        on_card=True,
        check=above(0),
    )
    mixed_precision: str | None = option(
        None,
        help="Precision of the forward pass.",
        unset="that of the launcher, or no",
        choices=MIXED_PRECISIONS,
        resumable=True,
        on_card=True,
    )
    max_skipped_steps: int = option(
        50, help="Number of consecutive fp16 overflows after which the run stops.", check=at_least(1), resumable=True
    )
    allow_tf32: bool = option(False, help="Allow matrix products in TF32 on NVIDIA GPUs.", resumable=True)
    compile: bool = option(False, help="Compile the model with torch.compile.", resumable=True)
    channels_last: bool = option(
        False,
        help="Use the memory format channels_last, which is faster on some devices.",
        negatable=True,
        resumable=True,
    )
    seed: int = option(0, help="Seed of the run.", check=at_least(0))


@dataclass(kw_only=True)
class TrainingOptions:
    """Options that all training scripts share."""

    preset: str | None = preset_option()
    config: Path | None = option(
        None,
        help="YAML file of options. The command line takes precedence over it, and the file over --preset.",
        resumable=True,
        saved=False,
    )
    dry_run: bool = option(
        False, help="Print size, cost and memory of the run without training.", resumable=True, saved=False
    )
    source: ImageSource = option_group(ImageSource, "dataset")
    format: ImageFormat = option_group(ImageFormat, "image format")
    selection: ImageSelection = option_group(ImageSelection, "training data")
    architecture: ArchitectureOptions = option_group(ArchitectureOptions, "architecture")
    diffusion: DiffusionOptions = option_group(DiffusionOptions, "diffusion")
    optimisation: OptimisationOptions = option_group(OptimisationOptions, "optimisation")
    output: OutputOptions = option_group(OutputOptions, "output")
    hub: HubOptions = option_group(HubOptions, "Hub")

    @property
    def push_every(self) -> int | None:
        """Number of steps between uploads during training."""
        return None


@dataclass
class ClassOptions:
    """Class labels of a UNet."""

    class_conditional: bool = option(
        True, help="Train a class-conditional UNet, which is given the labels of the images."
    )
    label_dropout: float = option(
        0.0,
        help="Probability that an image is trained with the null class instead of its label.",
        check=in_range(0, 1),
    )


@dataclass
class AverageOptions:
    """
    Moving averages of the weights.

    Raises:
        ValueError: If the warm-up is described, but not requested.
    """

    ema_decay: tuple[float, ...] = option(
        (0.9999,),
        help="Rates of the moving averages, such as 0.9999,0.999.",
        check=Check("one or more rates in [0, 1)", lambda rates: rates and all(0 <= rate < 1 for rate in rates)),
    )
    use_ema_warmup: bool = option(False, help="Raise the rates up to --ema_decay as 1 - (1 + step / gamma) ** -power.")
    ema_inv_gamma: float = option(1.0, help="Gamma of the warm-up.", check=above(0))
    ema_power: float = option(0.75, help="Power of the warm-up.", check=at_least(0))
    offload_ema: bool = option(False, help="Keep the moving averages in the memory of the CPU.", resumable=True)

    def __post_init__(self):
        for name in ("ema_inv_gamma", "ema_power"):
            given = getattr(self, name)
            if given != getattr(type(self), name) and not self.use_ema_warmup:
                raise ValueError(f"--{name} {given} has no effect without --use_ema_warmup. Leave it out.")

    @property
    def num_on_device(self) -> int:
        """Number of averages in the memory of the accelerator's device."""
        return 0 if self.offload_ema else len(self.ema_decay)


@dataclass
class ValidationOptions:
    """Pictures and uploads during training."""

    num_validation_images: int = option(
        20, help="Number of images drawn at each validation.", check=at_least(1), resumable=True
    )
    push_every: int | None = option(
        None,
        help="Number of steps between uploads of the pipeline during training. It must be a multiple of --validation_steps, if"
        " that is given.",
        unset="one upload, at the end",
        check=at_least(1),
        resumable=True,
    )


@dataclass(kw_only=True)
class PipelineTrainingOptions(TrainingOptions):
    """
    Options of a training that saves a pipeline.

    Raises:
        ValueError: If options contradict one another.
    """

    classes: ClassOptions = option_group(ClassOptions, "classes")
    averages: AverageOptions = option_group(AverageOptions, "moving averages")
    validation: ValidationOptions = option_group(ValidationOptions, "validation")

    def __post_init__(self):
        push_every, validation_steps = self.push_every, self.output.validation_steps
        if push_every is not None and not self.hub.push_to_hub:
            raise ValueError("--push_every requires --push_to_hub.")
        if push_every is not None and validation_steps is not None and push_every % validation_steps:
            raise ValueError(
                f"--push_every must be a multiple of --validation_steps {validation_steps}, because pipelines are saved then,"
                f" but got {push_every}."
            )
        if self.classes.label_dropout and not self.classes.class_conditional:
            raise ValueError("--label_dropout requires a class-conditional model. Leave out --no-class_conditional.")

    @property
    def push_every(self) -> int | None:
        """Number of steps between uploads during training."""
        return self.validation.push_every


@dataclass(kw_only=True)
class UNetTrainingOptions(PipelineTrainingOptions):
    """
    Options of a UNet's training.

    Raises:
        ValueError: If options contradict one another.
    """

    preset: str | None = preset_option("unet")
    objective: ObjectiveOptions = option_group(ObjectiveOptions, "objective")
    noise_levels: NoiseLevelOptions = option_group(NoiseLevelOptions, "noise levels")

    def __post_init__(self):
        check_objective(self.objective, self.noise_levels)
        super().__post_init__()


@dataclass
class UpsamplerOptions:
    """Small images, which an upsampler enlarges."""

    low_resolution: int = option(
        16,
        help="Height and width of the small images, in pixels. It must be a divisor of --resolution.",
        check=at_least(1),
    )
    low_res_noise: float = option(
        0.0,
        help="Largest standard deviation of noise added to the small images. It makes the upsampler robust to flaws of generated"
        " small images.",
        check=at_least(0),
    )


@dataclass(kw_only=True)
class UpsamplerTrainingOptions(UNetTrainingOptions):
    """
    Options of an upsampler's training.

    Raises:
        ValueError: If options contradict one another.
    """

    preset: str | None = preset_option("upsampler")
    upsampler: UpsamplerOptions = option_group(UpsamplerOptions, "upsampler")

    def __post_init__(self):
        super().__post_init__()
        small, large = self.upsampler.low_resolution, self.format.resolution
        if not 0 < small < large or large % small:
            raise ValueError(
                f"--low_resolution must be a divisor of --resolution {large} and smaller, but got {small}."
            )


@dataclass
class ClassifierOptions:
    """Head and loss of a classifier."""

    pool: str = option("attention", help="Pooling layers after the encoder.", choices=POOLS)
    entropy_weight: float = option(
        0.0,
        help="Weight of the entropy of the prediction in the loss, which penalises confidence. Its paper uses 0.1.",
        check=at_least(0),
    )


@dataclass(kw_only=True)
class ClassifierTrainingOptions(TrainingOptions):
    """Options of a classifier's training."""

    preset: str | None = preset_option("classifier")
    format: ImageFormat = option_group(ImageFormat, "image format", crop="random")
    optimisation: OptimisationOptions = option_group(
        OptimisationOptions, "optimisation", learning_rate=3e-4, lr_scheduler="linear", adam_weight_decay=0.05
    )
    classifier: ClassifierOptions = option_group(ClassifierOptions, "classifier")
