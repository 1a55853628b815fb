"""The released ADM checkpoints as one table: where each is to be had, what it is, and the score it must reproduce.

Source: the README of openai/guided-diffusion for files, flags and guidance scales; Dhariwal & Nichol 2021 (arXiv
2105.05233), Tables 4 to 6, for the scores.
"""

from dataclasses import dataclass


DOWNLOAD_FOLDER = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"


@dataclass(frozen=True)
class Preset:
    """
    A released checkpoint.

    Args:
        file: Name of the file.
        kind: "unet", "upsampler" or "classifier".
        flags: Its model flags on the published command line.
        imagenet_labels: Whether its labels are the 1000 classes of ImageNet.
        guidance_scale: Published scale of classifier guidance for sampling with it; `None` where it is not guided.
        timestep_respacing: Respacing that is recommended for it; `None` means the 250 steps of all others.
        fid: FID of 50 000 samples that it must reproduce; a classifier has none of its own.
        fid_setting: How those samples are drawn.
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

PRESETS = {
    preset.file: preset
    for preset in (
        Preset(
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
        Preset(
            "128x128_diffusion.pt",
            "unet",
            "--attention_resolutions 32,16,8 --class_cond True --image_size 128 --noise_schedule linear"
            f" --num_channels 256 --num_heads 4 --num_res_blocks 2 --use_fp16 True {_UNET}",
            imagenet_labels=True,
            guidance_scale=0.5,
            fid=2.97,
            fid_setting="250 steps, guided by 128x128_classifier.pt at scale 0.5",
        ),
        Preset(
            "256x256_diffusion.pt",
            "unet",
            f"--class_cond True {_ADM_256}",
            imagenet_labels=True,
            guidance_scale=1.0,
            fid=4.59,
            fid_setting="250 steps, guided by 256x256_classifier.pt at scale 1",
        ),
        Preset(
            "256x256_diffusion_uncond.pt",
            "unet",
            f"--class_cond False {_ADM_256}",
            guidance_scale=10.0,
            fid=12.00,
            fid_setting="250 steps, guided by 256x256_classifier.pt at scale 10",
        ),
        Preset(
            "512x512_diffusion.pt",
            "unet",
            "--attention_resolutions 32,16,8 --class_cond True --image_size 512 --noise_schedule linear"
            f" --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --use_fp16 False {_UNET}",
            imagenet_labels=True,
            guidance_scale=4.0,
            fid=7.72,
            fid_setting="250 steps, guided by 512x512_classifier.pt at scale 4",
        ),
        Preset(
            "64_256_upsampler.pt",
            "upsampler",
            f"--attention_resolutions 32,16,8 --large_size 256 --small_size 64 --num_heads 4 {_UPSAMPLER}",
            imagenet_labels=True,
            fid=3.94,
            fid_setting="250 steps, from guided samples of 64x64_diffusion.pt (250 steps)",
        ),
        Preset(
            "128_512_upsampler.pt",
            "upsampler",
            # Table 13 says 32,16,8; the weights have no attention at 8.
            f"--attention_resolutions 32,16 --large_size 512 --small_size 128 --num_head_channels 64 {_UPSAMPLER}",
            imagenet_labels=True,
            fid=3.85,
            # Table 12: the classifier behind this score was trained otherwise than that behind the 2.97 at 128x128.
            fid_setting="250 steps, from guided samples of 128x128_diffusion.pt (250 steps)",
        ),
        Preset(
            "lsun_bedroom.pt",
            "unet",
            f"{_LSUN} --dropout 0.1",
            timestep_respacing="1000",
            fid=1.90,
            fid_setting="1000 steps, not guided",
        ),
        Preset(
            "lsun_cat.pt",
            "unet",
            f"{_LSUN} --dropout 0.1",
            timestep_respacing="1000",
            fid=5.57,
            fid_setting="1000 steps, not guided",
        ),
        Preset(
            "lsun_horse.pt",
            "unet",
            f"{_LSUN} --dropout 0.1",
            timestep_respacing="1000",
            fid=2.57,
            fid_setting="1000 steps, not guided",
        ),
        Preset(
            "lsun_horse_nodropout.pt",
            "unet",
            f"{_LSUN} --dropout 0.0",
            timestep_respacing="1000",
            fid=2.95,
            fid_setting="1000 steps, not guided",
        ),
        Preset(
            "64x64_classifier.pt",
            "classifier",
            f"--image_size 64 --classifier_depth 4 {_CLASSIFIER}",
            imagenet_labels=True,
        ),
        Preset(
            "128x128_classifier.pt",
            "classifier",
            f"--image_size 128 --classifier_depth 2 {_CLASSIFIER}",
            imagenet_labels=True,
        ),
        Preset(
            "256x256_classifier.pt",
            "classifier",
            f"--image_size 256 --classifier_depth 2 {_CLASSIFIER}",
            imagenet_labels=True,
        ),
        Preset(
            "512x512_classifier.pt",
            "classifier",
            f"--image_size 512 --classifier_depth 2 {_CLASSIFIER}",
            imagenet_labels=True,
        ),
    )
}


def guiding_classifier(preset: Preset) -> Preset | None:
    """The classifier that the published samples of a UNet are guided by; `None` where they are not."""
    size = preset.file.split("_")[0]
    return PRESETS[f"{size}_classifier.pt"] if preset.guidance_scale is not None else None


def imagenet_class_names() -> list[str]:
    """Names of ImageNet's 1000 classes in the order of their labels; some name two classes."""
    from torchvision.models import ResNet18_Weights  # slow to import, and wanted by few

    return list(ResNet18_Weights.DEFAULT.meta["categories"])
