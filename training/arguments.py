"""The options of the training scripts: their groups, configuration files, and what may not contradict what."""

import argparse
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from diffusers import DDPMScheduler

from diffusers_adm.data.datasets import LabelledImages, StreamedImages, load_images
from diffusers_adm.data.images import ImageFormat
from diffusers_adm.data.options import ImageSelection, ImageSource
from diffusers_adm.openai.flags import BETA_SCHEDULES, Flags, build_scheduler
from diffusers_adm.options import add_options, build_options


# What a resumed run may be given anew. All else decides what is trained, or the order of what it sees.
RESUMABLE_OPTIONS = {
    "allow_tf32", "cache_dir", "channels_last", "checkpointing_steps", "checkpoints_total_limit", "compile", "config",
    "dataloader_num_workers", "dataset_name", "data_files", "dry_run", "gradient_checkpointing", "hub_model_id",
    "hub_private_repo", "hub_revision", "hub_retry_seconds", "hub_token", "keep_every", "learning_rate", "logging_steps", "lr_scheduler", "lr_warmup_steps",
    "max_grad_norm", "max_skipped_steps", "max_train_steps", "mixed_precision", "num_epochs", "num_validation_images", "offload_ema",
    "on_unreadable", "output_dir", "preset",
    "pretrained_model_name_or_path", "pretrained_subfolder", "push_every", "push_to_hub", "report_to", "resume_from_checkpoint", "train_data_dir",
    "validation_steps",
}  # fmt: skip

# Switches that a command line puts off.
ON_BY_DEFAULT = {"random_flip", "class_conditional", "learn_sigma"}

POSITIVE_OPTIONS = (
    "train_batch_size",
    "gradient_accumulation_steps",
    "total_batch_size",
    "max_train_steps",
    "num_epochs",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "keep_every",
    "logging_steps",
    "validation_steps",
    "max_skipped_steps",
)


def build_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all scripts share, in groups."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--preset", choices=preset_names(), default=None, help="Recipe whose options are the defaults."
    )
    parser.add_argument(
        "--config", type=Path, default=None, help="YAML file of options; what the command line gives wins over it."
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="Print size, cost and memory of what would be trained, and stop."
    )
    add_data_arguments(parser)

    group = parser.add_argument_group("architecture")
    group.add_argument("--model_channels", type=int, default=128)
    group.add_argument("--channel_mult", type=numbers(float), default=(1, 2, 3, 4), help="For example 0.5,1,2.")
    group.add_argument("--layers_per_block", type=int, default=2)
    group.add_argument("--attention_resolutions", type=numbers(int), default=(32, 16, 8), help="In pixels.")
    group.add_argument("--attention_head_dim", type=int, default=64)
    group.add_argument("--num_attention_heads", type=int, default=None, help="Instead of the heads' width.")
    group.add_argument("--norm_num_groups", type=int, default=32)
    group.add_argument("--resnet_time_scale_shift", choices=("scale_shift", "default"), default="scale_shift")
    group.add_argument("--resample_type", choices=("resnet", "conv"), default="resnet")
    group.add_argument("--output_scale_factor", type=float, default=1.0, help="1.4142 for the paper's ablation.")
    group.add_argument("--dropout", type=float, default=0.0)
    group.add_argument("--gradient_checkpointing", action="store_true")
    group.add_argument(
        "--pretrained_model_name_or_path",
        help="Model to start from, of the same architecture; its classes may differ.",
    )
    group.add_argument("--pretrained_subfolder", default=None, help="Where it lies in a pipeline: unet, classifier.")

    group = parser.add_argument_group("diffusion")
    group.add_argument("--noise_schedule", choices=BETA_SCHEDULES, default="linear")
    group.add_argument("--num_train_timesteps", type=int, default=1000)

    group = parser.add_argument_group("optimisation")
    group.add_argument("--train_batch_size", type=int, default=64, help="Of one process, in one forward pass.")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument(
        "--total_batch_size", type=int, default=None, help="Of one step of all processes: sets the accumulation."
    )
    group.add_argument("--max_train_steps", type=int, default=None, help="Optimizer steps.")
    group.add_argument("--num_epochs", type=int, default=None, help="Passes over the images, instead of steps.")
    group.add_argument("--learning_rate", type=float, default=1e-4)
    group.add_argument("--lr_scheduler", default="constant")
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=0.999)
    group.add_argument("--adam_weight_decay", type=float, default=0.0)
    group.add_argument("--adam_epsilon", type=float, default=1e-8)
    group.add_argument("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes.")
    group.add_argument(
        "--max_grad_norm", type=float, default=None, help="Clip gradients to this norm; default: never."
    )
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default=None)
    group.add_argument(
        "--max_skipped_steps", type=int, default=50, help="Stop after so many overflows of fp16 in a row."
    )
    group.add_argument("--allow_tf32", action="store_true")
    group.add_argument("--compile", action="store_true", help="torch.compile the model.")
    group.add_argument("--channels_last", action=argparse.BooleanOptionalAction, default=False)
    group.add_argument("--seed", type=int, default=0)

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=Path, required=True)
    group.add_argument("--checkpointing_steps", type=int, default=5000)
    group.add_argument("--checkpoints_total_limit", type=int, default=2)
    group.add_argument("--keep_every", type=int, default=None, help="Keep checkpoints of multiples of it for good.")
    group.add_argument("--resume_from_checkpoint", default=None, help='Folder of a checkpoint, or "latest".')
    group.add_argument("--logging_steps", type=int, default=50)
    group.add_argument("--validation_steps", type=int, default=5000)
    group.add_argument("--report_to", default=None, help="A tracker of accelerate: tensorboard, wandb, ...")

    group = parser.add_argument_group("Hub")
    group.add_argument("--push_to_hub", action="store_true", help="Upload what was trained, at the end.")
    group.add_argument("--hub_model_id", default=None, help="Such as me/my-model.")
    group.add_argument("--hub_token", default=None, help="That of `hf auth login` by default.")
    group.add_argument("--hub_revision", default=None, help="Branch to push to; made if it does not exist.")
    group.add_argument("--hub_private_repo", action="store_true", help="Make a new repository private.")
    group.add_argument(
        "--hub_retry_seconds", type=float, default=30.0, help="Between two attempts; then twice as many."
    )
    return parser


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `load_images_of`, except for `seed`."""
    add_options(parser, ImageSource, title="dataset")
    add_options(parser, ImageFormat, title="image format")
    add_options(parser, ImageSelection, title="training data")


def load_images_of(
    args: argparse.Namespace, labelled: bool = True
) -> tuple[LabelledImages | StreamedImages, LabelledImages | None]:
    """Loads the images that the options of `add_data_arguments` and `seed` name, see `load_images`."""
    source, format, selection = (build_options(cls, args) for cls in (ImageSource, ImageFormat, ImageSelection))
    return load_images(source, format, selection, seed=args.seed, labelled=labelled)


def numbers(kind: type) -> Callable[[str], tuple]:
    """What parses numbers with commas between them."""

    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(",") if part)

    return parse


def preset_names() -> list[str]:
    """The recipes that ship with this package."""
    folder = resources.files("diffusers_adm.training") / "presets"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """
    Parses the command line; under it lies what `--config` gives, and under that what `--preset` gives.

    Raises:
        ValueError: If a configuration file is not a table of options, or a number is out of its range.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=preset_names())
    first.add_argument("--config", type=Path)
    sources, _ = first.parse_known_args(argv)
    from_config, preset = [], sources.preset
    if sources.config is not None:
        if not sources.config.is_file():
            raise ValueError(f"--config {sources.config}: there is no such file.")
        from_config = _as_words(parser, sources.config.read_text(), f"--config {sources.config}")
        preset = preset or first.parse_known_args(from_config)[0].preset
    words = from_config
    if preset is not None:
        recipe = resources.files("diffusers_adm.training") / "presets" / f"{preset}.yaml"
        words = _as_words(parser, recipe.read_text(), f"--preset {preset}") + from_config
    words = [*words, *argv]
    args = parser.parse_args(words)
    names = [word.partition("=")[0] for word in words]
    lengths = [name for name in names if name in ("--num_epochs", "--max_train_steps")]
    if lengths and lengths[-1] == "--max_train_steps":  # the later of the two wins, as of all options
        args.num_epochs = None
    if args.max_train_steps is None and args.num_epochs is None:
        parser.error(
            "--max_train_steps or --num_epochs must be given: on the command line, by --config or by --preset."
        )
    for name in POSITIVE_OPTIONS:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1.")
    return args


def _as_words(parser: argparse.ArgumentParser, text: str, source: str) -> list[str]:
    """Options of a YAML table as words of a command line, so that they are checked as those are."""
    table = yaml.safe_load(text)
    if not isinstance(table, dict):
        raise ValueError(f"{source} is not a table of options and values.")
    options = {action.dest: action for action in parser._actions}
    words = []
    for name, value in table.items():
        if name not in options:
            raise ValueError(f"{source}: this script has no option {name!r}.")
        action = options[name]
        if value is None:
            continue
        if isinstance(value, bool):
            if action.nargs != 0:
                raise ValueError(f"{source}: {name} takes a value; put quotes round yes, no, on and off.")
            if value or isinstance(action, argparse.BooleanOptionalAction):
                words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)] if action.nargs else [f"--{name}", ",".join(map(str, value))]
        else:
            words.append(f"--{name}={value}")
    return words


def as_yaml(args: argparse.Namespace) -> str:
    """All options as a file that `--config` takes; a token stays out of it."""
    table = {}
    for name, value in vars(args).items():
        if name in ("config", "dry_run", "hub_token"):
            continue
        table[name] = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(table, sort_keys=False)


def as_options(args: argparse.Namespace) -> list[str]:
    """The words of a command line for all options that say what is trained and how."""
    shown = {"learning_rate", "lr_scheduler", "lr_warmup_steps", "max_grad_norm", "max_train_steps", "mixed_precision"}
    words = []
    for name, value in yaml.safe_load(as_yaml(args)).items():
        if value is None or (name in RESUMABLE_OPTIONS and name not in shown):
            continue
        if isinstance(value, bool):
            if value or name in ON_BY_DEFAULT:
                words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"--{name} {','.join(map(str, value)) if isinstance(value, list) else value}")
    return words


def contradictions(args: argparse.Namespace, text: str) -> list[str]:
    """Options that differ from those of the interrupted run, as "name now (then)", where they may not."""
    now, then = yaml.safe_load(as_yaml(args)), yaml.safe_load(text)
    free = RESUMABLE_OPTIONS
    if args.total_batch_size is not None:  # how it is divided depends on the number of processes
        free = free | {"train_batch_size", "gradient_accumulation_steps"}
    if args.streaming:  # workers read files of their own
        free = free - {"dataloader_num_workers"}
    return [
        f"--{name} {now[name]} (was {then[name]})"
        for name in now
        if name not in free and name in then and now[name] != then[name]
    ]


def build_noise_scheduler(
    args: argparse.Namespace, learn_sigma: bool = True, predict_xstart: bool = False
) -> DDPMScheduler:
    """
    The scheduler that is trained with, and saved beside the UNet.

    Raises:
        ValueError: If there are too few timesteps for the schedule.
    """
    flags = Flags(
        diffusion_steps=args.num_train_timesteps, noise_schedule=args.noise_schedule, predict_xstart=predict_xstart
    )
    return build_scheduler(flags, learn_sigma)


def architecture(args: argparse.Namespace) -> dict[str, Any]:
    """The part of a model's config that all models share."""
    return {
        "sample_size": args.resolution,
        "in_channels": args.in_channels,
        "model_channels": args.model_channels,
        "channel_mult": args.channel_mult,
        "layers_per_block": args.layers_per_block,
        "attention_resolutions": args.attention_resolutions,
        "attention_head_dim": None if args.num_attention_heads else args.attention_head_dim,
        "num_attention_heads": args.num_attention_heads,
        "norm_num_groups": args.norm_num_groups,
        "resnet_time_scale_shift": args.resnet_time_scale_shift,
        "downsample_type": args.resample_type,
        "output_scale_factor": args.output_scale_factor,
        "dropout": args.dropout,
    }


def resolve_steps(args: argparse.Namespace, num_images: int | None, num_processes: int) -> None:
    """
    Sets `max_train_steps` to that of `num_epochs`.

    Raises:
        ValueError: If the number of images is not known, or there are too few for a batch on each process.
    """
    if args.num_epochs is None:
        return
    if num_images is None:
        raise ValueError(
            "--num_epochs needs to know how many images there are, which a stream does not: give --max_train_steps."
        )
    check_number_of_images(args, num_images, num_processes)
    batches = args.num_epochs * (num_images // (args.train_batch_size * num_processes))
    args.max_train_steps = max(1, batches // args.gradient_accumulation_steps)


def check_number_of_images(args: argparse.Namespace, num_images: int | None, num_processes: int) -> None:
    """Raises a ValueError if there are too few images for one batch a process; a stream's number is not known."""
    if num_images is not None and num_images < args.train_batch_size * num_processes:
        raise ValueError(
            f"{num_images} images do not fill a batch of {args.train_batch_size} on each of {num_processes} processes."
        )


def run_script(main: Callable[[argparse.Namespace], None], parse_args: Callable[[], argparse.Namespace]) -> None:
    """What a script does when it is launched: what cannot be used is told in one line."""
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
