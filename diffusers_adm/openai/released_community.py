"""Checkpoints that others have trained with the original code, or with code that differs from it only in the flags.

Source: the README, the configurations and the download scripts of each repository. If no license of the weights is stated,
the license of the code is given.
"""

from diffusers_adm.openai.released_family import IMPROVED_LSUN_LAYOUT
from diffusers_adm.openai.released_guided import ADM_256_LAYOUT
from diffusers_adm.openai.released_rows import ReleasedCheckpoint, TensorLayout


_LINEAR_1000 = "--class_cond False --diffusion_steps 1000 --learn_sigma True --noise_schedule linear"


def _drive(file_id: str) -> str:
    # The address behind the page that asks for a confirmation of large files.
    return f"https://drive.usercontent.google.com/download?id={file_id}&export=download&confirm=t"


def _community(
    name: str, file: str, flags: str, trained_on: str, layout: TensorLayout, address: str, code: str, **columns
) -> ReleasedCheckpoint:
    columns = {"license": "MIT (code)", **columns}
    return ReleasedCheckpoint(
        file,
        "unet",
        f"{flags} {_LINEAR_1000}" if "--noise_schedule" not in flags else flags,
        name=name,
        trained_on=trained_on,
        layout=layout,
        address=address,
        code=code,
        **columns,
    )


# --- The small UNet of P2-weighting and ILVR ---


def _p2(name: str, file: str, trained_on: str, address: str, code: str = "jychoi118/P2-weighting", **columns):
    flags = (
        "--image_size 256 --num_channels 128 --num_res_blocks 1 --num_head_channels 64 --attention_resolutions 16"
        " --resblock_updown True --use_scale_shift_norm True"
    )
    layout = TensorLayout("1ffa5b3b9b24aa3e", 93_563_910)
    return _community(name, file, flags, trained_on, layout, address, code, **columns)


_BASELINE = "trained with the usual weights of the loss"
P2_WEIGHTING = (
    _p2(
        "ffhq-10m",
        "ffhq_10m.pt",
        "FFHQ",
        "https://huggingface.co/deepinv/diffunet/resolve/main/diffusion_ffhq_10m.pt",
        "jychoi118/ilvr_adm",
        note="faces, used by ILVR, DPS, DiffPIR, DAPS and deepinv",
        # ffhq256.pt is no alias, because other projects have files of this name.
        aliases=("diffusion_ffhq_10m.pt",),
    ),
    _p2(
        "afhq-dog-4m",
        "afhq_dog_4m.pt",
        "AFHQ dog",
        _drive("14OG_o3aa8Hxmfu36IIRyOgRwEP6ngLdo"),
        "jychoi118/ilvr_adm",
        note="used by ILVR and EGSDE",
    ),
    _p2("p2-ffhq", "ffhq_p2.pt", "FFHQ", _drive("1nlCPBqOqSeqAQ8F4noThbnmr4okriwTc")),
    _p2("p2-ffhq-baseline", "ffhq_baseline.pt", "FFHQ", _drive("17SR1lih6BxBxJhr8s1iOjhw540H3Pc_m"), note=_BASELINE),
    _p2("p2-celebahq", "celebahq_p2.pt", "CelebA-HQ", _drive("1ag8JnvKGKo6L6avO_dTFEBNWJo2jZIDF")),
    _p2(
        "p2-afhq-dog",
        "afhqdog_p2.pt",
        "AFHQ dog",
        _drive("1f6_swzSPNJXs9FWf6AW585bv7dORzRWf"),
        aliases=("afhq_p2.pt",),
    ),
    _p2(
        "p2-afhq-dog-baseline",
        "afhq_baseline.pt",
        "AFHQ dog",
        _drive("1bv-xnJC1-qBg9ZlVdugsXLuHVsKj1RRE"),
        note=_BASELINE,
    ),
    _p2("p2-metfaces", "metface_p2.pt", "MetFaces", _drive("1swjgSB1WFF9JnBR6W6Newnfzdyo1nPYf")),
    _p2(
        "p2-metfaces-baseline",
        "metface_baseline.pt",
        "MetFaces",
        _drive("1SaHqew52S9iRCeN7kpPMLqlo2t34ekTb"),
        note=_BASELINE,
    ),
    _p2("p2-flowers", "flower_p2.pt", "Oxford flowers", _drive("1d6DDKAEu_iwNzxlBaVrETHBcc6oF5jYf")),
    _p2(
        "p2-flowers-baseline",
        "flower_baseline.pt",
        "Oxford flowers",
        _drive("1sAO2OJ8j1kza2zH8MerbD6hGxdKsoogB"),
        note=_BASELINE,
    ),
    _p2("p2-cub", "cub_p2.pt", "CUB birds", _drive("13RKF9MLNR3zpMMNchW7JtsjktVMgS0rK")),
    _p2(
        "p2-cub-baseline", "cub_baseline.pt", "CUB birds", _drive("1Wv-hHL7bhGsWyCp3i-RK6YcodcRrD-dj"), note=_BASELINE
    ),
)

# --- The unconditional UNet of 256x256_diffusion_uncond.pt, and the same for 512x512 pixels ---

_ADM_UNCONDITIONAL = (
    "--num_channels 256 --num_head_channels 64 --num_res_blocks 2 --attention_resolutions 32,16,8 --resblock_updown True"
    " --use_scale_shift_norm True"
)
_ADM_512_LAYOUT = TensorLayout("1187e28cbe21fdbf", 557_973_638)


def _adm_256(name: str, file: str, trained_on: str, address: str, code: str, dropout: float = 0.0, **columns):
    flags = f"--image_size 256 --dropout {dropout} {_ADM_UNCONDITIONAL}"
    return _community(name, file, flags, trained_on, ADM_256_LAYOUT, address, code, **columns)


_REPAINT = {
    "code": "andreas128/RePaint",
    "license": "CC BY-NC-SA 4.0",
    "terms": "non-commercial",
    "note": "for inpainting by RePaint",
}
ADM_UNCONDITIONAL = (
    _adm_256(
        "repaint-celebahq",
        "celeba256_250000.pt",
        "CelebA-HQ",
        _drive("1norNWWGYP3EZ_o05DmoW1ryKuKMmhlCX"),
        **_REPAINT,
    ),
    _adm_256(
        "repaint-places", "places256_300000.pt", "Places2", _drive("1QEl-btGbzQz6IwkXiFGd49uQNTUtTHsk"), **_REPAINT
    ),
    _adm_256(
        "ddpm-segmentation-ffhq",
        # Other files are called ffhq.pt too.
        "ddpm_checkpoints/ffhq.pt",
        "FFHQ",
        "https://storage.yandexcloud.net/yandex-research/ddpm-segmentation/models/ddpm_checkpoints/ffhq.pt",
        "yandex-research/ddpm-segmentation",
        dropout=0.1,
        note="features for segmentation",
    ),
    _community(
        "imagenet-512-uncond",
        "512x512_diffusion_uncond_finetune_008100.pt",
        f"--image_size 512 {_ADM_UNCONDITIONAL}",
        "ImageNet",
        _ADM_512_LAYOUT,
        "https://huggingface.co/lowlevelware/512x512_diffusion_unconditional_ImageNet/resolve/main/"
        "512x512_diffusion_uncond_finetune_008100.pt",
        "alembics/disco-diffusion",
        license="MIT",
        sha256="9c111ab89e214862b76e1fa6a1b3f1d329b1a88281885943d2cdbe357ad57648",
        note="512x512_diffusion.pt fine-tuned for 8100 steps without labels; used by Disco Diffusion",
    ),
    _community(
        "openimages-512",
        "512x512_diffusion_uncond_openimages_epoch28_withfilter.pt",
        f"--image_size 512 {_ADM_UNCONDITIONAL}",
        "OpenImages",
        _ADM_512_LAYOUT,
        "https://set.zlkj.in/models/diffusion/512x512_diffusion_uncond_openimages_epoch28_withfilter.pt",
        "nshepperd/jax-guided-diffusion",
        license="not stated",
        unsupported="it predicts v, on a schedule that the original code does not have",
    ),
)

# --- Pictures of single authors, for Disco Diffusion ---


def _kaliyuga(name: str, stem: str, sha256: str) -> ReleasedCheckpoint:
    return _community(
        name,
        f"{stem}.pt",
        "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --attention_resolutions 16"
        " --use_scale_shift_norm False --rescale_timesteps True",
        "pictures of its author",
        IMPROVED_LSUN_LAYOUT,
        f"https://huggingface.co/KaliYuga/{stem}/resolve/main/{stem}.pt",
        "alembics/disco-diffusion",
        license="not stated",
        sha256=sha256,
        note="for Disco Diffusion",
    )


DISCO_DIFFUSION = (
    _kaliyuga(
        "pixel-art-hard",
        "pixel_art_diffusion_hard_256",
        "be4a9de943ec06eef32c65a1008c60ad017723a4d35dc13169c66bb322234161",
    ),
    _kaliyuga(
        "pixel-art-soft",
        "pixel_art_diffusion_soft_256",
        "d321590e46b679bf6def1f1914b47c89e762c76f19ab3e3392c8ca07c791039c",
    ),
    _kaliyuga("pixel-art-expanded", "PADexpanded", "a73b40556634034bf43b5a716b531b46fb1ab890634d854f5bcbbef56838739a"),
    _kaliyuga(
        "pixel-art-4k", "pixelartdiffusion4k", "a1ba4f13f6dabb72b1064f15d8ae504d98d6192ad343572cc416deda7cccac30"
    ),
    _kaliyuga("watercolor", "watercolordiffusion", "a3e6522f0c8f278f90788298d66383b11ac763dd5e0d62f8252c962c23950bd6"),
    _kaliyuga(
        "watercolor-2", "watercolordiffusion_2", "49c281b6092c61c49b0f1f8da93af9b94be7e0c20c71e662e2aa26fee0e4b1a9"
    ),
    _kaliyuga("pulp-scifi", "PulpSciFiDiffusion", "b79e62613b9f50b8a3173e5f61f0320c7dbb16efad42a92ec94d014f6e17337f"),
    _community(
        "portrait-512",
        "portrait_generator_v001_ema_0.9999_1MM.pt",
        "--image_size 512 --num_channels 128 --num_res_blocks 2 --num_heads 4 --attention_resolutions 32,16,8"
        " --resblock_updown True --use_scale_shift_norm True --rescale_timesteps True",
        "portraits",
        TensorLayout("4eee732fef10b8ab", 139_579_462),
        "https://huggingface.co/felipe3dartist/portrait_generator_v001/resolve/main/"
        "portrait_generator_v001_ema_0.9999_1MM.pt",
        "alembics/disco-diffusion",
        license="not stated",
        sha256="b7e8c747af880d4480b6707006f1ace000b058dd0eac5bb13558ba3752d9b5b9",
        note="for Disco Diffusion",
    ),
)

# --- Input perturbation (DDPM-IP) and epsilon scaling (ADM-ES) ---

_COSINE = (
    "--num_res_blocks 3 --use_new_attention_order True --learn_sigma True --diffusion_steps 1000 --noise_schedule cosine"
    " --use_scale_shift_norm True --resblock_updown True --class_cond False"
)
_IP_FLAGS = {
    32: "--image_size 32 --channel_mult 1,2,2,2 --num_channels 128 --num_head_channels 32 --attention_resolutions 16,8"
    f" --dropout 0.3 {_COSINE}",
    64: "--image_size 64 --num_channels 192 --num_head_channels 64 --attention_resolutions 32,16,8 --dropout 0.1"
    f" {_COSINE}",
    128: "--image_size 128 --num_channels 256 --num_head_channels 64 --attention_resolutions 32,16,8 --dropout 0.1"
    f" {_COSINE}",
}
_IP_LAYOUTS = {
    32: TensorLayout("2a2f2118883f06da", 57_094_662),
    64: TensorLayout("dec20b9c50071d54", 295_136_454),
    128: TensorLayout("9a2fbc83822d7176", 542_811_398),
}


def _perturbed(name: str, file: str, size: int, trained_on: str, file_id: str) -> ReleasedCheckpoint:
    note = "trained with perturbed inputs" if "-ip-" in name else "baseline of the model with perturbed inputs"
    return _community(
        name,
        file,
        _IP_FLAGS[size],
        trained_on,
        _IP_LAYOUTS[size],
        _drive(file_id),
        "forever208/DDPM-IP",
        note=note,
    )


# All files are called ADM-IP.pt or ADM.pt. This package adds the folders.
INPUT_PERTURBATION = (
    _perturbed("adm-ip-cifar10", "cifar10/ADM-IP.pt", 32, "CIFAR-10", "107CyhiRazNZWkksvoyYRLn71Pcs5FOBo"),
    _perturbed("adm-cifar10", "cifar10/ADM.pt", 32, "CIFAR-10", "1m-a3WqfpMTibzuTC2om046yWQr20GT0I"),
    _perturbed("adm-ip-imagenet-32", "imagenet32/ADM-IP.pt", 32, "ImageNet", "1FFUJDk-__9y9DnAG6DKDx5W7LgEIuJyk"),
    _perturbed("adm-ip-lsun-tower", "lsun_tower64/ADM-IP.pt", 64, "LSUN tower", "1QUaY94bSAiTdGu5T_GtdIXMvGT3X1GMy"),
    _perturbed("adm-lsun-tower", "lsun_tower64/ADM.pt", 64, "LSUN tower", "1_7gLg44qP4v5bgJNvSo65MtXDZ3xXW39"),
    _perturbed("adm-ip-celeba", "celeba64/ADM-IP.pt", 64, "CelebA", "1Us9zKaIMh8dDlAZVXt3hR2FQYwhxEPYk"),
    _perturbed("adm-ip-ffhq-128", "ffhq128/ADM-IP.pt", 128, "FFHQ", "1cadXgH2YYVGGi5os-h6oQAp_8XCTURc7"),
    _perturbed("adm-ffhq-128", "ffhq128/ADM.pt", 128, "FFHQ", "1P5Kgyyqp4Zv1RiW116MgBmeX299bGcDw"),
)

# --- DifFace ---


def _difface(name: str, file: str, flags: str, layout: TensorLayout, **columns) -> ReleasedCheckpoint:
    return _community(
        name,
        file,
        f"{flags} --num_head_channels 64 --resblock_updown False --use_scale_shift_norm True",
        "FFHQ",
        layout,
        f"https://github.com/zsyOAOA/DifFace/releases/download/V1.0/{file}",
        "zsyOAOA/DifFace",
        license="S-Lab License 1.0",
        terms="non-commercial",
        note="for restoring faces by DifFace",
        **columns,
    )


DIFFACE = (
    _difface(
        "difface-ffhq-256",
        "iddpm_ffhq256_ema750000.pth",
        "--image_size 256 --num_channels 128 --channel_mult 1,1,2,2,4,4 --num_res_blocks 2 --attention_resolutions 16,8",
        TensorLayout("1dd9e17cbbe7b9e8", 124_056_710),
    ),
    _difface(
        "difface-ffhq-512",
        "iddpm_ffhq512_ema500000.pth",
        "--image_size 512 --num_channels 32 --channel_mult 1,2,4,8,8,16,16 --num_res_blocks 1,2,2,2,2,3,4"
        " --attention_resolutions 32,16,8",
        TensorLayout("e17ba1aac82a5cfc", 159_788_454),
    ),
)

COMMUNITY = P2_WEIGHTING + ADM_UNCONDITIONAL + DISCO_DIFFUSION + INPUT_PERTURBATION + DIFFACE
