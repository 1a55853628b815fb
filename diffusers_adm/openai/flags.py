"""The flags of the published command line (openai/guided-diffusion): reading them, and the scheduler they describe."""

import difflib
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusers_adm.openai.released import PRESETS, Preset
from diffusers_adm.respacing import respaced_timesteps


Checkpoint = str | os.PathLike | Mapping[str, torch.Tensor]

BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def _boolean(text: str) -> bool:
    values = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    values |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    return values[text.lower()]


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _multipliers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",")) if text else ()


# What is read of the command line: the kind of value, and the default of the published scripts.
_FLAGS: dict[str, tuple[Callable[[str], Any], Any]] = {
    "image_size": (int, 64),
    "large_size": (int, 256),
    "small_size": (int, 64),
    "num_channels": (int, 128),
    "num_res_blocks": (int, 2),
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
    "classifier_depth": (int, 2),
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
}
_KINDS = {
    int: "an integer",
    float: "a number",
    _boolean: "True or False",
    _integers: "integers separated by commas",
    _multipliers: "numbers separated by commas",
}
# What belongs to a run and leaves model and diffusion process as they are; so does whatever ends in one of the suffixes.
_RUN_FLAGS = frozenset(
    "anneal_lr base_samples batch_size classifier_use_fp16 ema_rate eval_interval fp16_scale_growth iterations"
    " log_interval lr lr_anneal_steps microbatch noised num_samples rescale_learned_sigmas resume_checkpoint"
    " save_interval schedule_sampler use_checkpoint use_fp16 use_kl weight_decay".split()
)
_RUN_SUFFIXES = ("_path", "_dir")


class Flags(dict):
    """The flags that are given; one that is not reads as the published default."""

    def __missing__(self, name: str) -> Any:
        return _FLAGS[name][1]


def _flag_texts(flags: str) -> dict[str, str]:
    if not isinstance(flags, str):
        raise ValueError(f"flags must be one string, such as '--image_size 64': got {flags!r}.")
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise ValueError(f"flags={flags!r} cannot be read: {error}.") from error
    texts = {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"flags={flags!r}: {word!r} stands where a flag (--name value) should.")
        name, separator, text = word[2:].partition("=")
        if name not in _FLAGS and name not in _RUN_FLAGS and not name.endswith(_RUN_SUFFIXES):
            near = difflib.get_close_matches(name, [*_FLAGS, *_RUN_FLAGS], n=3)
            raise ValueError(f"--{name} is not a known flag" + (f"; near it are {near}." if near else "."))
        if not separator:
            if not words or words[0].startswith("--"):
                raise ValueError(f"--{name} lacks a value.")
            text = words.pop(0)
        texts[name] = text
    return texts


def parse_flags(flags: str) -> Flags:
    """
    Reads flags of the published command line, as `--name value` or `--name=value`. Those that concern the run only
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
                raise ValueError(f"--{name} takes {_KINDS[kind]}: got {text!r}.") from error
    return parsed


def classifier_flags(flags: str | None) -> str | None:
    """Of a command line for UNet and classifier, the part that describes the classifier."""
    if flags is None:
        return None
    texts = _flag_texts(flags)
    return shlex.join(
        f"--{name}={text}" for name, text in texts.items() if name == "image_size" or name.startswith("classifier_")
    )


def released_preset(checkpoint: Checkpoint | None) -> Preset | None:
    """The row of the table of released checkpoints that a path belongs to by its file's name; `None` for all else."""
    return PRESETS.get(Path(checkpoint).name) if isinstance(checkpoint, (str, os.PathLike)) else None


def resolve_flags(checkpoint: Checkpoint, flags: str | None) -> Flags:
    """
    The flags of a checkpoint: the published ones of a released file, overridden by those that are given.

    Raises:
        ValueError: If no flags are given for a checkpoint that is not a released one, or they cannot be used.
    """
    preset = released_preset(checkpoint)
    if preset is None and flags is None:
        source = "a state dict" if isinstance(checkpoint, Mapping) else repr(os.fspath(checkpoint))
        raise ValueError(
            f"flags are missing: {source} is not a released file, and shapes do not tell --image_size, --num_heads or"
            " --num_head_channels, --use_new_attention_order, --noise_schedule and others. Give the model flags of the"
            f" published command line. Released files, which need none, are {', '.join(PRESETS)}."
        )
    resolved = Flags({**parse_flags(preset.flags if preset else ""), **parse_flags(flags or "")})
    heads = resolved["num_heads_upsample"]
    if resolved["num_head_channels"] == -1 and heads not in (-1, resolved["num_heads"]):
        raise ValueError(
            f"--num_heads_upsample {heads} is not supported: all attention has --num_heads {resolved['num_heads']}."
        )
    if resolved["rescale_timesteps"] and resolved["diffusion_steps"] != 1000:
        raise ValueError(
            "--rescale_timesteps True is supported with --diffusion_steps 1000 alone, where it changes nothing: got"
            f" --diffusion_steps {resolved['diffusion_steps']}."
        )
    for name in ("image_size", "large_size", "num_heads", "num_head_channels", "classifier_num_head_channels"):
        if resolved[name] < 1 and (name, resolved[name]) != ("num_head_channels", -1):
            raise ValueError(f"--{name} must be at least 1: got {resolved[name]}.")
    return resolved


def build_scheduler(flags: Flags, learns_variance: bool) -> DDPMScheduler | DDIMScheduler:
    """
    The stock scheduler that samples as the published scripts do with these flags.

    Args:
        flags: Of the UNet.
        learns_variance: Whether the UNet's output holds the variance.

    Raises:
        ValueError: If the flags describe no diffusion process.
    """
    steps, noise_schedule = flags["diffusion_steps"], flags["noise_schedule"]
    if noise_schedule not in BETA_SCHEDULES:
        raise ValueError(f"--noise_schedule {noise_schedule} is not one of {sorted(BETA_SCHEDULES)}.")
    if steps < 1:
        raise ValueError(f"--diffusion_steps must be at least 1: got {steps}.")
    # The published linear schedule is stretched or squeezed to end at the same noise as with 1000 steps.
    beta_start, beta_end = 1000 / steps * 1e-4, 1000 / steps * 0.02
    if noise_schedule == "linear" and beta_end > 1:
        raise ValueError(f"--noise_schedule linear needs --diffusion_steps of at least 20: got {steps}.")
    respaced_timesteps(flags["timestep_respacing"], steps)  # raises where it cannot be
    kwargs = {
        "num_train_timesteps": steps,
        "beta_schedule": BETA_SCHEDULES[noise_schedule],
        "beta_start": beta_start,
        "beta_end": beta_end,
        "prediction_type": "sample" if flags["predict_xstart"] else "epsilon",
        "clip_sample": flags["clip_denoised"],
    }
    if flags["use_ddim"]:
        return DDIMScheduler(timestep_spacing="leading", **kwargs)
    fixed = "fixed_small" if flags["sigma_small"] else "fixed_large"
    variance_type = "learned_range" if learns_variance else fixed
    return DDPMScheduler(variance_type=variance_type, timestep_spacing="linspace", **kwargs)
