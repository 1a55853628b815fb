"""Table of the released checkpoints: where each can be downloaded, what it is, and the score that it must reproduce.

Source: the README of openai/guided-diffusion for files, flags and guidance scales; Dhariwal & Nichol 2021 (arXiv
2105.05233), Tables 4 to 6, for the scores.
"""

import os
from dataclasses import dataclass
from pathlib import Path


DOWNLOAD_FOLDER = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """
    Released checkpoint.

    Args:
        file: Name of the file.
        kind: Kind of the model: "unet", "upsampler" or "classifier".
        flags: Model flags of the original command line.
        imagenet_labels: Whether the labels are the 1000 classes of ImageNet.
        guidance_scale: Published scale of classifier guidance for sampling. `None` for a model that is not guided.
        timestep_respacing: Respacing that is recommended for sampling. `None` means 250 steps.
        fid: FID of 50 000 samples that the model must reproduce. `None` for classifiers.
        fid_setting: Steps and guidance with which those samples are drawn.
    """

    file: str
    kind: str
    flags: str
    imagenet_labels: bool = False
    guidance_scale: float | None = None
    timestep_respacing: str | None = None
    fid: float | None = None
    fid_setting: str | None = None

    @property
    def url(self) -> str:
        """Address of the file."""
        return DOWNLOAD_FOLDER + self.file


_UNET = "--diffusion_steps 1000 --learn_sigma True --resblock_updown True --use_scale_shift_norm True"
_ADM_256 = (
    "--attention_resolutions 32,16,8 --image_size 256 --noise_schedule linear --num_channels 256"
    f" --num_head_channels 64 --num_res_blocks 2 --use_fp16 True {_UNET}"
)
_LSUN = f"--class_cond False {_ADM_256}"
_UPSAMPLER = f"--class_cond True --noise_schedule linear --num_channels 192 --num_res_blocks 2 --use_fp16 True {_UNET}"
_CLASSIFIER = (
    "--classifier_attention_resolutions 32,16,8 --classifier_width 128 --classifier_pool attention"
    " --classifier_resblock_updown True --classifier_use_scale_shift_norm True"
)

RELEASED_CHECKPOINTS = {
    released.file: released
    for released in (
        ReleasedCheckpoint(
            "64x64_diffusion.pt",
            "unet",
            # The only UNet that stores queries, keys and values before heads.
            "--attention_resolutions 32,16,8 --class_cond True --dropout 0.1 --image_size 64 --noise_schedule cosine"
            " --num_channels 192 --num_head_channels 64 --num_res_blocks 3 --use_new_attention_order True"
            f" --use_fp16 True {_UNET}",
            imagenet_labels=True,
            guidance_scale=1.0,
            fid=2.07,
            # The README lists it among guided results; Table 5 has it in the row of the model without guidance.
            fid_setting="250 steps, not guided",
        ),
        ReleasedCheckpoint(
            "128x128_diffusion.pt",
            "unet",
            "--attention_resolutions 32,16,8 --class_cond True --image_size 128 --noise_schedule linear"
            f" --num_channels 256 --num_heads 4 --num_res_blocks 2 --use_fp16 True {_UNET}",
            imagenet_labels=True,
            guidance_scale=0.5,
            fid=2.97,
            fid_setting="250 steps, guided by 128x128_classifier.pt at scale 0.5",
        ),
        ReleasedCheckpoint(
            "256x256_diffusion.pt",
            "unet",
            f"--class_cond True {_ADM_256}",
            imagenet_labels=True,
            guidance_scale=1.0,
            fid=4.59,
            fid_setting="250 steps, guided by 256x256_classifier.pt at scale 1",
        ),
        ReleasedCheckpoint(
            "256x256_diffusion_uncond.pt",
            "unet",
            f"--class_cond False {_ADM_256}",
            guidance_scale=10.0,
            fid=12.00,
            fid_setting="250 steps, guided by 256x256_classifier.pt at scale 10",
        ),
        ReleasedCheckpoint(
            "512x512_diffusion.pt",
            "unet",
            "--attention_resolutions 32,16,8 --class_cond True --image_size 512 --noise_schedule linear"
            f" --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --use_fp16 False {_UNET}",
            imagenet_labels=True,
            guidance_scale=4.0,
            fid=7.72,
            fid_setting="250 steps, guided by 512x512_classifier.pt at scale 4",
        ),
        ReleasedCheckpoint(
            "64_256_upsampler.pt",
            "upsampler",
            f"--attention_resolutions 32,16,8 --large_size 256 --small_size 64 --num_heads 4 {_UPSAMPLER}",
            imagenet_labels=True,
            fid=3.94,
            fid_setting="250 steps, from guided samples of 64x64_diffusion.pt (250 steps)",
        ),
        ReleasedCheckpoint(
            "128_512_upsampler.pt",
            "upsampler",
            # Table 13 says 32,16,8; the weights have no attention at 8.
            f"--attention_resolutions 32,16 --large_size 512 --small_size 128 --num_head_channels 64 {_UPSAMPLER}",
            imagenet_labels=True,
            fid=3.85,
            # Table 12: the classifier behind this score was trained otherwise than that behind the 2.97 at 128x128.
            fid_setting="250 steps, from guided samples of 128x128_diffusion.pt (250 steps)",
        ),
        ReleasedCheckpoint(
            "lsun_bedroom.pt",
            "unet",
            f"{_LSUN} --dropout 0.1",
            timestep_respacing="1000",
            fid=1.90,
            fid_setting="1000 steps, not guided",
        ),
        ReleasedCheckpoint(
            "lsun_cat.pt",
            "unet",
            f"{_LSUN} --dropout 0.1",
            timestep_respacing="1000",
            fid=5.57,
            fid_setting="1000 steps, not guided",
        ),
        ReleasedCheckpoint(
            "lsun_horse.pt",
            "unet",
            f"{_LSUN} --dropout 0.1",
            timestep_respacing="1000",
            fid=2.57,
            fid_setting="1000 steps, not guided",
        ),
        ReleasedCheckpoint(
            "lsun_horse_nodropout.pt",
            "unet",
            f"{_LSUN} --dropout 0.0",
            timestep_respacing="1000",
            fid=2.95,
            fid_setting="1000 steps, not guided",
        ),
        ReleasedCheckpoint(
            "64x64_classifier.pt",
            "classifier",
            f"--image_size 64 --classifier_depth 4 {_CLASSIFIER}",
            imagenet_labels=True,
        ),
        ReleasedCheckpoint(
            "128x128_classifier.pt",
            "classifier",
            f"--image_size 128 --classifier_depth 2 {_CLASSIFIER}",
            imagenet_labels=True,
        ),
        ReleasedCheckpoint(
            "256x256_classifier.pt",
            "classifier",
            f"--image_size 256 --classifier_depth 2 {_CLASSIFIER}",
            imagenet_labels=True,
        ),
        ReleasedCheckpoint(
            "512x512_classifier.pt",
            "classifier",
            f"--image_size 512 --classifier_depth 2 {_CLASSIFIER}",
            imagenet_labels=True,
        ),
    )
}


def find_released(checkpoint: object) -> ReleasedCheckpoint | None:
    """Returns the released checkpoint that a path names by its file. `None` for other paths and for state dicts."""
    return RELEASED_CHECKPOINTS.get(Path(checkpoint).name) if isinstance(checkpoint, (str, os.PathLike)) else None


def guiding_classifier(unet: ReleasedCheckpoint) -> ReleasedCheckpoint | None:
    """Returns the classifier that guides a UNet's published samples. `None` where they are not guided."""
    size = unet.file.split("_")[0]
    return RELEASED_CHECKPOINTS[f"{size}_classifier.pt"] if unet.guidance_scale is not None else None


def imagenet_class_names() -> list[str]:
    """Returns the names of ImageNet's 1000 classes in the order of their labels. Some names occur twice."""
    from torchvision.models import ResNet18_Weights  # slow to import, and rarely needed

    return list(ResNet18_Weights.DEFAULT.meta["categories"])
