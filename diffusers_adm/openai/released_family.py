"""Checkpoints of openai/improved-diffusion and openai/consistency_models.

Source: the README and the scripts of each repository for files, addresses and flags.
"""

from diffusers_adm.openai.released_rows import ReleasedCheckpoint, TensorLayout


# --- improved-diffusion ---

_IMPROVED_FOLDER = "https://openaipublic.blob.core.windows.net/diffusion/march-2021/"
IMPROVED_LSUN_LAYOUT = TensorLayout("073694a5e925cca5", 113_676_678)
# Timesteps are rescaled by default in improved-diffusion.
_COSINE_4000 = (
    "--num_channels 128 --num_res_blocks 3 --learn_sigma True --diffusion_steps 4000 --noise_schedule cosine"
    " --rescale_timesteps True"
)
_IMPROVED_LSUN = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True --use_scale_shift_norm False"
    " --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear --rescale_timesteps False"
)


def _improved(
    name: str, file: str, flags: str, trained_on: str, layout: TensorLayout, kind: str = "unet", **columns
) -> ReleasedCheckpoint:
    return ReleasedCheckpoint(
        file,
        kind,
        flags,
        name=name,
        trained_on=trained_on,
        layout=layout,
        address=_IMPROVED_FOLDER + file,
        license="MIT (code)",
        code="openai/improved-diffusion",
        **columns,
    )


_IMAGENET_64 = ("ImageNet", TensorLayout("f219a0eab64190f0", 121_063_942))
_CIFAR_10 = ("CIFAR-10", TensorLayout("c59b73b3912666b3", 52_546_438))
_LIKELIHOOD = "trained with the variational bound alone, for likelihoods"

IMPROVED_DIFFUSION = (
    _improved(
        "iddpm-imagenet-64",
        "imagenet64_uncond_100M_1500K.pt",
        f"--image_size 64 {_COSINE_4000}",
        *_IMAGENET_64,
    ),
    _improved(
        "iddpm-imagenet-64-vlb",
        "imagenet64_uncond_vlb_100M_1500K.pt",
        f"--image_size 64 {_COSINE_4000}",
        *_IMAGENET_64,
        note=_LIKELIHOOD,
    ),
    _improved(
        "iddpm-imagenet-64-cond",
        "imagenet64_cond_270M_250K.pt",
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True --diffusion_steps 4000"
        " --noise_schedule cosine --rescale_timesteps False",
        "ImageNet",
        TensorLayout("26892bcd0143b6eb", 273_049_350),
        imagenet_labels=True,
    ),
    _improved(
        "iddpm-imagenet-64-256-upsampler",
        "upsample_cond_500K.pt",
        "--large_size 256 --small_size 64 --num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True"
        " --diffusion_steps 4000 --noise_schedule linear --rescale_timesteps False",
        "ImageNet",
        TensorLayout("dac1aa5cc8a56e3c", 279_792_390),
        kind="upsampler",
        imagenet_labels=True,
    ),
    _improved(
        "iddpm-cifar10",
        "cifar10_uncond_50M_500K.pt",
        f"--image_size 32 --dropout 0.3 {_COSINE_4000}",
        *_CIFAR_10,
    ),
    _improved(
        "iddpm-cifar10-vlb",
        "cifar10_uncond_vlb_50M_500K.pt",
        f"--image_size 32 --dropout 0.3 {_COSINE_4000}",
        *_CIFAR_10,
        note=_LIKELIHOOD,
    ),
    _improved(
        "iddpm-lsun-bedroom",
        "lsun_uncond_100M_1200K_bs128.pt",
        _IMPROVED_LSUN,
        "LSUN bedroom",
        IMPROVED_LSUN_LAYOUT,
        sha256="38e66420ba5c703df8ce78750721976e13442064b5df847b82f05ebc65120534",
        note="1.2 million steps",
    ),
    _improved(
        "iddpm-lsun-bedroom-2400k",
        "lsun_uncond_100M_2400K_bs64.pt",
        _IMPROVED_LSUN,
        "LSUN bedroom",
        IMPROVED_LSUN_LAYOUT,
        note="2.4 million steps",
    ),
)

# --- consistency_models ---

_CONSISTENCY_FOLDER = "https://openaipublic.blob.core.windows.net/consistency/"
_CONSISTENCY = (
    "--attention_resolutions 32,16,8 --num_head_channels 64 --resblock_updown True --learn_sigma False --use_fp16 True"
)
_CONSISTENCY_64 = f"--image_size 64 --num_channels 192 --num_res_blocks 3 --class_cond True --use_scale_shift_norm True {_CONSISTENCY}"
_CONSISTENCY_256 = f"--image_size 256 --num_channels 256 --num_res_blocks 2 --class_cond False --use_scale_shift_norm False {_CONSISTENCY}"
_CONSISTENCY_64_LAYOUT = TensorLayout("b07ff3cdbda93a89", 295_899_267)
_CONSISTENCY_256_LAYOUT = TensorLayout("2dc6cdf89c58275a", 526_304_771)


def _consistency(name: str, file: str, trained_on: str, note: str, sampling: str, **columns) -> ReleasedCheckpoint:
    is_imagenet = trained_on == "ImageNet"
    return ReleasedCheckpoint(
        file,
        "unet",
        f"{_CONSISTENCY_64 if is_imagenet else _CONSISTENCY_256} {sampling}",
        imagenet_labels=is_imagenet,
        name=name,
        trained_on=trained_on,
        layout=_CONSISTENCY_64_LAYOUT if is_imagenet else _CONSISTENCY_256_LAYOUT,
        address=_CONSISTENCY_FOLDER + file,
        license="MIT (code)",
        code="openai/consistency_models",
        for_research=True,
        note=note,
        **columns,
    )


# How each was trained, and its sampler in the original code's list of commands.
_HEUN = "--training_mode edm --dropout 0.1 --sampler heun --steps 40"
_ONE_STEP = "--training_mode consistency_distillation --sampler onestep"


def _multistep(training_mode: str, steps: int, ts: str) -> str:
    return f"--training_mode consistency_{training_mode} --sampler multistep --steps {steps} --ts {ts}"


_EDM = "diffusion model of Karras et al. 2022"
_CD_L2 = "consistency model in one step or few, distilled by the L2 distance"
_CD_LPIPS = "consistency model in one step or few, distilled by LPIPS"
_CT = "consistency model in one step or few, trained without a teacher"

CONSISTENCY_MODELS = (
    _consistency("edm-imagenet-64", "edm_imagenet64_ema.pt", "ImageNet", _EDM, _HEUN),
    _consistency(
        "cd-imagenet-64-l2", "cd_imagenet64_l2.pt", "ImageNet", _CD_L2, _multistep("distillation", 40, "0,22,39")
    ),
    _consistency(
        "cd-imagenet-64-lpips",
        "cd_imagenet64_lpips.pt",
        "ImageNet",
        _CD_LPIPS,
        _multistep("distillation", 40, "0,22,39"),
    ),
    _consistency("ct-imagenet-64", "ct_imagenet64.pt", "ImageNet", _CT, _multistep("training", 201, "0,106,200")),
    _consistency(
        "edm-lsun-bedroom",
        "edm_bedroom256_ema.pt",
        "LSUN bedroom",
        _EDM,
        _HEUN,
        sha256="5947bb5ae7b664feef1796ebe0a531efcf689d76e81d03ba88159dd8019b674f",
    ),
    _consistency(
        "cd-lsun-bedroom-l2", "cd_bedroom256_l2.pt", "LSUN bedroom", _CD_L2, _multistep("distillation", 40, "0,18,39")
    ),
    _consistency(
        "cd-lsun-bedroom-lpips",
        "cd_bedroom256_lpips.pt",
        "LSUN bedroom",
        _CD_LPIPS,
        _multistep("distillation", 40, "0,17,39"),
    ),
    _consistency("ct-lsun-bedroom", "ct_bedroom256.pt", "LSUN bedroom", _CT, _multistep("training", 151, "0,67,150")),
    _consistency("edm-lsun-cat", "edm_cat256_ema.pt", "LSUN cat", _EDM, _HEUN),
    _consistency("cd-lsun-cat-l2", "cd_cat256_l2.pt", "LSUN cat", _CD_L2, _ONE_STEP),
    _consistency("cd-lsun-cat-lpips", "cd_cat256_lpips.pt", "LSUN cat", _CD_LPIPS, _ONE_STEP),
    _consistency("ct-lsun-cat", "ct_cat256.pt", "LSUN cat", _CT, _multistep("training", 151, "0,62,150")),
)
