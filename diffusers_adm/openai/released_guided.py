"""Checkpoints that openai/guided-diffusion released, with the scores that they must reproduce.

Source: the README of openai/guided-diffusion for files, flags and guidance scales; Dhariwal & Nichol 2021 (arXiv
2105.05233), Tables 4 to 6, for the scores.
"""

from functools import partial

from diffusers_adm.openai.released_rows import ReleasedCheckpoint, TensorLayout


_UNET = "--diffusion_steps 1000 --learn_sigma True --resblock_updown True --use_scale_shift_norm True"
_ADM_256 = (
    "--attention_resolutions 32,16,8 --image_size 256 --noise_schedule linear --num_channels 256"
    f" --num_head_channels 64 --num_res_blocks 2 --use_fp16 True {_UNET}"
)
ADM_256_LAYOUT = TensorLayout("86f5708ebb91ab69", 552_814_086)
_LSUN = f"--class_cond False {_ADM_256}"
_UPSAMPLER = f"--class_cond True --noise_schedule linear --num_channels 192 --num_res_blocks 2 --use_fp16 True {_UNET}"
_CLASSIFIER = (
    "--classifier_attention_resolutions 32,16,8 --classifier_width 128 --classifier_pool attention"
    " --classifier_resblock_updown True --classifier_use_scale_shift_norm True"
)

_guided = partial(ReleasedCheckpoint, license="MIT (code)", for_research=True)

GUIDED_DIFFUSION = (
    _guided(
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
        name="imagenet-64",
        guided_by="imagenet-64-classifier",
        trained_on="ImageNet",
        layout=TensorLayout("af57c12d0be8b4f4", 295_904_454),
    ),
    _guided(
        "128x128_diffusion.pt",
        "unet",
        "--attention_resolutions 32,16,8 --class_cond True --image_size 128 --noise_schedule linear"
        f" --num_channels 256 --num_heads 4 --num_res_blocks 2 --use_fp16 True {_UNET}",
        imagenet_labels=True,
        guidance_scale=0.5,
        fid=2.97,
        fid_setting="250 steps, guided by 128x128_classifier.pt at scale 0.5",
        name="imagenet-128",
        guided_by="imagenet-128-classifier",
        trained_on="ImageNet",
        layout=TensorLayout("44eb5c6a285f9d17", 421_529_606),
    ),
    _guided(
        "256x256_diffusion.pt",
        "unet",
        f"--class_cond True {_ADM_256}",
        imagenet_labels=True,
        guidance_scale=1.0,
        fid=4.59,
        fid_setting="250 steps, guided by 256x256_classifier.pt at scale 1",
        name="imagenet-256",
        guided_by="imagenet-256-classifier",
        trained_on="ImageNet",
        layout=TensorLayout("6d41483df3735902", 553_838_086),
    ),
    _guided(
        "256x256_diffusion_uncond.pt",
        "unet",
        f"--class_cond False {_ADM_256}",
        guidance_scale=10.0,
        fid=12.00,
        fid_setting="250 steps, guided by 256x256_classifier.pt at scale 10",
        name="imagenet-256-uncond",
        guided_by="imagenet-256-classifier",
        trained_on="ImageNet",
        layout=ADM_256_LAYOUT,
    ),
    _guided(
        "512x512_diffusion.pt",
        "unet",
        "--attention_resolutions 32,16,8 --class_cond True --image_size 512 --noise_schedule linear"
        f" --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --use_fp16 False {_UNET}",
        imagenet_labels=True,
        guidance_scale=4.0,
        fid=7.72,
        fid_setting="250 steps, guided by 512x512_classifier.pt at scale 4",
        name="imagenet-512",
        guided_by="imagenet-512-classifier",
        trained_on="ImageNet",
        layout=TensorLayout("90cfe02eac79fe24", 558_997_638),
    ),
    _guided(
        "64_256_upsampler.pt",
        "upsampler",
        f"--attention_resolutions 32,16,8 --large_size 256 --small_size 64 --num_heads 4 {_UPSAMPLER}",
        imagenet_labels=True,
        fid=3.94,
        fid_setting="250 steps, from guided samples of 64x64_diffusion.pt (250 steps)",
        name="imagenet-64-256-upsampler",
        trained_on="ImageNet",
        layout=TensorLayout("2171275097dc629a", 311_795_910),
    ),
    _guided(
        "128_512_upsampler.pt",
        "upsampler",
        # Table 13 says 32,16,8; the weights have no attention at 8.
        f"--attention_resolutions 32,16 --large_size 512 --small_size 128 --num_head_channels 64 {_UPSAMPLER}",
        imagenet_labels=True,
        fid=3.85,
        # Table 12: the classifier of this score and the classifier of the 2.97 at 128x128 were trained differently.
        fid_setting="250 steps, from guided samples of 128x128_diffusion.pt (250 steps)",
        name="imagenet-128-512-upsampler",
        trained_on="ImageNet",
        layout=TensorLayout("0379ba7ff3ffeb4f", 308_835_270),
    ),
    _guided(
        "lsun_bedroom.pt",
        "unet",
        f"{_LSUN} --dropout 0.1",
        timestep_respacing="1000",
        fid=1.90,
        fid_setting="1000 steps, not guided",
        name="lsun-bedroom",
        trained_on="LSUN bedroom",
        layout=ADM_256_LAYOUT,
    ),
    _guided(
        "lsun_cat.pt",
        "unet",
        f"{_LSUN} --dropout 0.1",
        timestep_respacing="1000",
        fid=5.57,
        fid_setting="1000 steps, not guided",
        name="lsun-cat",
        trained_on="LSUN cat",
        layout=ADM_256_LAYOUT,
    ),
    _guided(
        "lsun_horse.pt",
        "unet",
        f"{_LSUN} --dropout 0.1",
        timestep_respacing="1000",
        fid=2.57,
        fid_setting="1000 steps, not guided",
        name="lsun-horse",
        trained_on="LSUN horse",
        layout=ADM_256_LAYOUT,
    ),
    _guided(
        "lsun_horse_nodropout.pt",
        "unet",
        f"{_LSUN} --dropout 0.0",
        timestep_respacing="1000",
        fid=2.95,
        fid_setting="1000 steps, not guided",
        name="lsun-horse-nodropout",
        note="trained without dropout, with a worse FID in the paper",
        trained_on="LSUN horse",
        layout=ADM_256_LAYOUT,
    ),
    _guided(
        "64x64_classifier.pt",
        "classifier",
        f"--image_size 64 --noise_schedule cosine --classifier_depth 4 {_CLASSIFIER}",
        imagenet_labels=True,
        name="imagenet-64-classifier",
        trained_on="ImageNet",
        layout=TensorLayout("98f9cbaa7b28a2c4", 65_438_568),
    ),
    _guided(
        "128x128_classifier.pt",
        "classifier",
        f"--image_size 128 --noise_schedule linear --classifier_depth 2 {_CLASSIFIER}",
        imagenet_labels=True,
        name="imagenet-128-classifier",
        trained_on="ImageNet",
        layout=TensorLayout("b2e8e68f3386213b", 42_568_040),
    ),
    _guided(
        "256x256_classifier.pt",
        "classifier",
        f"--image_size 256 --noise_schedule linear --classifier_depth 2 {_CLASSIFIER}",
        imagenet_labels=True,
        name="imagenet-256-classifier",
        trained_on="ImageNet",
        layout=TensorLayout("3524443c57fd1ae5", 54_096_360),
    ),
    _guided(
        "512x512_classifier.pt",
        "classifier",
        f"--image_size 512 --noise_schedule linear --classifier_depth 2 {_CLASSIFIER}",
        imagenet_labels=True,
        name="imagenet-512-classifier",
        trained_on="ImageNet",
        layout=TensorLayout("04d1005b8a050740", 54_448_360),
    ),
)
