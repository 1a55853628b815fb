"""Flags of the original command lines.

The flags of openai/guided-diffusion, openai/improved-diffusion and openai/consistency_models are known.
"""

import difflib
import shlex
from collections.abc import Callable
from typing import Any


# Preconditioning of the models of consistency_models by their training mode, which cannot be inferred from the weights.
PRECONDITIONING_OF = {"edm": "edm", "consistency_distillation": "consistency", "consistency_training": "consistency"}

# Fixed in consistency_models: standard deviation of the images, and factor of c_noise.
PUBLISHED_SIGMA_DATA = 0.5
PUBLISHED_SIGMA_SCALE = 1000.0


def _boolean(text: str) -> bool:
    values = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    values |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    return values[text.lower()]


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _multipliers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",")) if text else ()


def _blocks(text: str) -> int | tuple[int, ...]:
    """Parses one number for all levels, or one per level, which only models of DifFace and of this package have."""
    numbers = _integers(text)
    return numbers[0] if len(set(numbers)) == 1 else numbers


# Flags of the model and its diffusion process: the type of the value, and the default of the original scripts.
_FLAGS: dict[str, tuple[Callable[[str], Any], Any]] = {
    "image_size": (int, 64),
    "large_size": (int, 256),
    "small_size": (int, 64),
    "num_channels": (int, 128),
    "num_res_blocks": (_blocks, 2),
    "num_heads": (int, 4),
    "num_heads_upsample": (int, -1),
    "num_head_channels": (int, -1),
    "attention_resolutions": (_integers, (16, 8)),
    "channel_mult": (_multipliers, ()),
    "dropout": (float, 0.0),
    "class_cond": (_boolean, False),
    "use_scale_shift_norm": (_boolean, True),
    "resblock_updown": (_boolean, False),
    "use_new_attention_order": (_boolean, False),
    "classifier_width": (int, 128),
    "classifier_depth": (_blocks, 2),
    "classifier_attention_resolutions": (_integers, (32, 16, 8)),
    "classifier_use_scale_shift_norm": (_boolean, True),
    "classifier_resblock_updown": (_boolean, True),
    "classifier_pool": (str, "attention"),
    "classifier_num_head_channels": (int, 64),
    "classifier_out_channels": (int, 1000),
    "learn_sigma": (_boolean, False),
    "sigma_small": (_boolean, False),
    "diffusion_steps": (int, 1000),
    "noise_schedule": (str, "linear"),
    "predict_xstart": (_boolean, False),
    "rescale_timesteps": (_boolean, False),
    "timestep_respacing": (str, ""),
    "use_ddim": (_boolean, False),
    "clip_denoised": (_boolean, True),
    "classifier_scale": (float, 1.0),
    "training_mode": (str, "edm"),
    "sigma_min": (float, 0.002),
    "sigma_max": (float, 80.0),
    "sampler": (str, "heun"),
    "steps": (int, 40),
    "ts": (str, ""),
}
_COUNTS = (
    "image_size",
    "large_size",
    "num_heads",
    "num_head_channels",
    "classifier_num_head_channels",
    "diffusion_steps",
    "steps",
)
# Flags of a UNet that improved-diffusion lacks. It is the code in which timesteps are rescaled by default.
_GUIDED_DIFFUSION_FLAGS = ("num_head_channels", "resblock_updown", "use_new_attention_order")
_KINDS = {
    int: "an integer",
    float: "a number",
    _boolean: "True or False",
    _integers: "integers separated by commas",
    _blocks: "an integer, or one per level separated by commas",
    _multipliers: "numbers separated by commas",
}
# Flags of the run, which do not change the model or its diffusion process. Flags with one of the suffixes are also flags of the run.
_RUN_FLAGS = frozenset(
    "anneal_lr base_samples batch_size classifier_use_fp16 distill_steps_per_iter ema_rate end_scales eval_interval"
    " fp16_scale_growth generator global_batch_size iterations log_interval loss_norm lr lr_anneal_steps microbatch noised"
    " num_samples rescale_learned_sigmas resume_checkpoint s_churn s_noise s_tmax s_tmin save_interval scale_mode"
    " schedule_sampler seed start_ema start_scales target_ema_mode teacher_dropout total_training_steps use_checkpoint"
    " use_fp16 use_kl weight_decay weight_schedule".split()
)
_RUN_SUFFIXES = ("_path", "_dir")


class Flags(dict):
    """Given flags by name. A missing flag has the default of the original code."""

    def __missing__(self, name: str) -> Any:
        return _FLAGS[name][1]

    def of_classifier(self) -> "Flags":
        """Returns the flags of the classifier, from a command line that describes UNet and classifier."""
        shared = ("image_size", "diffusion_steps", "noise_schedule", "rescale_timesteps")
        return Flags({name: self[name] for name in self if name in shared or name.startswith("classifier_")})

    @property
    def timestep_scale(self) -> float:
        """Factor of the timesteps that the networks are given. Rescaled timesteps are in [0, 1000)."""
        return 1000 / self["diffusion_steps"] if self["rescale_timesteps"] else 1.0


def _flag_texts(flags: str) -> dict[str, str]:
    if not isinstance(flags, str):
        raise ValueError(f"`flags` must be one string, such as '--image_size 64', but got {flags!r}.")
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise ValueError(f"`flags` cannot be read ({error}), but got {flags!r}.") from error
    texts = {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(
                f"`flags` must be a list of --name value, but got {word!r} in place of a name in {flags!r}."
            )
        name, separator, text = word[2:].partition("=")
        if name not in _FLAGS and name not in _RUN_FLAGS and not name.endswith(_RUN_SUFFIXES):
            near = difflib.get_close_matches(name, [*_FLAGS, *_RUN_FLAGS], n=3)
            raise ValueError(
                f"--{name} is not a known flag." + (f" Similar flags: --{', --'.join(near)}." if near else "")
            )
        if not separator:
            if not words or words[0].startswith("--"):
                raise ValueError(f"--{name} requires a value, but got none.")
            text = words.pop(0)
        texts[name] = text
    return texts


def parse_flags(flags: str) -> Flags:
    """
    Parses flags of the original command line, as `--name value` or `--name=value`. Flags that concern only the run
    (`--batch_size`, `--use_fp16`, `--model_path`, ...) are left out.

    Raises:
        ValueError: If a flag is unknown, or its value cannot be read.
    """
    parsed = Flags()
    for name, text in _flag_texts(flags).items():
        if name in _FLAGS:
            kind = _FLAGS[name][0]
            try:
                parsed[name] = kind(text)
            except (KeyError, ValueError) as error:
                raise ValueError(f"--{name} must be {_KINDS[kind]}, but got {text!r}.") from error
    return parsed


def check_flags(flags: Flags) -> None:
    """
    Checks that flags describe a supported model.

    Raises:
        ValueError: If they do not describe one.
    """
    heads = flags["num_heads_upsample"]
    if flags["num_head_channels"] == -1 and heads not in (-1, flags["num_heads"]):
        raise ValueError(
            f"--num_heads_upsample must equal --num_heads, which is {flags['num_heads']}, but got {heads}."
        )
    for name in _COUNTS:
        if flags[name] < 1 and (name, flags[name]) != ("num_head_channels", -1):
            raise ValueError(f"--{name} must be at least 1, but got {flags[name]}.")


def check_timestep_scale(flags: Flags) -> None:
    """
    Checks that the flags of a UNet say whether its timesteps are rescaled.

    Raises:
        ValueError: If the flags do not say it, and the default depends on the unknown code that trained the UNet.
    """
    told = any(name in flags for name in ("rescale_timesteps", *_GUIDED_DIFFUSION_FLAGS))
    if flags["diffusion_steps"] != 1000 and not told:
        raise ValueError(
            f"--rescale_timesteps is required with --diffusion_steps {flags['diffusion_steps']}: pass --rescale_timesteps"
            " True for a UNet of improved-diffusion, where it is the default, or --rescale_timesteps False for a UNet of"
            " guided-diffusion."
        )


def preconditioning_config(flags: Flags) -> dict[str, Any]:
    """
    Returns the part of a UNet's config that describes the preconditioning of a network of consistency_models.

    Raises:
        ValueError: If the flags do not say how the network was trained.
    """
    if "training_mode" not in flags:
        raise ValueError(
            "--training_mode is required for a checkpoint of consistency_models, because it cannot be inferred from the weights:"
            f" pass one of {', '.join(PRECONDITIONING_OF)}."
        )
    if flags["training_mode"] not in PRECONDITIONING_OF:
        raise ValueError(
            f"--training_mode must be one of {', '.join(PRECONDITIONING_OF)}, but got {flags['training_mode']}."
        )
    return {
        "preconditioning": PRECONDITIONING_OF[flags["training_mode"]],
        "sigma_data": PUBLISHED_SIGMA_DATA,
        "sigma_min": flags["sigma_min"],
        "sigma_max": flags["sigma_max"],
        "timestep_scale": PUBLISHED_SIGMA_SCALE,
    }
