"""Saved models and pipelines that are damaged, incomplete or of another kind: one line names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ADMUNet2DModel, ADMUpsamplePipeline, ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.cli import main


WEIGHTS = "diffusion_pytorch_model.safetensors"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
FILES = ["model_index.json", "unet/config.json", "classifier/config.json", "scheduler/scheduler_config.json"]
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a folder": lambda path: path.unlink() or path.mkdir(),
    "a pointer": lambda path: path.write_bytes(LFS_POINTER),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe\x00" * 100),
    "a list": lambda path: path.write_bytes(b"[]"),
    "null": lambda path: path.write_bytes(b"null"),
    "a text": lambda path: path.write_bytes(b'"text"'),
    "an empty object": lambda path: path.write_bytes(b"{}"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refused(load: Callable, *messages: str) -> None:
    """Asserts that loading raises one line, of files or of values, that holds each message."""
    with pytest.raises((ValueError, OSError)) as error:
        load()
    text = str(error.value)
    assert "\n" not in text and all(message in text for message in messages), text


def change(path: Path, **entries) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, f"unet/{WEIGHTS}", f"classifier/{WEIGHTS}"])
def test_damaged_file_is_named(name, damage, copy):
    DAMAGES[damage](copy / name)
    folder, file = str((copy / name).parent), Path(name).name
    refused(lambda: ClassifierGuidedPipeline.from_pretrained(copy), folder, file)
    model_class = {"unet": ADMUNet2DModel, "classifier": NoisyClassifier}.get(Path(name).parent.name)
    if model_class is not None:
        refused(lambda: model_class.from_pretrained(copy / Path(name).parent), folder, file)
        refused(lambda: model_class.from_pretrained(copy, subfolder=Path(name).parent.name), folder, file)


@pytest.mark.parametrize(
    "source, target",
    [
        ("classifier/config.json", "unet/config.json"),
        ("unet/config.json", "classifier/config.json"),
        ("scheduler/scheduler_config.json", "unet/config.json"),
        ("model_index.json", "unet/config.json"),
        ("unet/config.json", "scheduler/scheduler_config.json"),
        ("unet/config.json", "model_index.json"),
        (f"classifier/{WEIGHTS}", f"unet/{WEIGHTS}"),
    ],
)
def test_file_of_something_else_is_refused(source, target, copy):
    shutil.copy(copy / source, copy / target)
    refused(
        lambda: ClassifierGuidedPipeline.from_pretrained(copy), "ot" if target == "model_index.json" else str(copy)
    )


@pytest.mark.parametrize("part", ["unet", "classifier", "scheduler"])
def test_missing_folder_of_a_component_is_named(part, copy):
    shutil.rmtree(copy / part)
    refused(lambda: ClassifierGuidedPipeline.from_pretrained(copy), str(copy / part))


@pytest.mark.parametrize("size", [None, "20KB"], ids=["one file", "shards"])
def test_variant_that_must_be_passed_is_named(size, tmp_path):
    for variant in ("fp16", "bf16"):
        tiny_pipeline().save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    advice = (WEIGHTS, "Pass variant='bf16' or variant='fp16'.")
    refused(lambda: ADMUNet2DModel.from_pretrained(tmp_path / "unet"), str(tmp_path / "unet"), *advice)
    refused(lambda: NoisyClassifier.from_pretrained(tmp_path, subfolder="classifier", variant="fp32"), advice[1])
    refused(lambda: ClassifierGuidedPipeline.from_pretrained(tmp_path), advice[1])
    ADMUNet2DModel.from_pretrained(tmp_path / "unet", variant="fp16")


WRONG_ENTRIES = [
    ("unet/config.json", {"sample_size": "8"}, "sample_size"),
    ("unet/config.json", {"sample_size": None}, "sample_size"),
    ("unet/config.json", {"channel_mult": "12"}, "channel_mult"),
    ("unet/config.json", {"dropout": "a"}, "dropout"),
    ("unet/config.json", {"use_null_class": "no"}, "use_null_class"),
    ("unet/config.json", {"layers_per_block": 2.5}, "layers_per_block"),
    ("unet/config.json", {"num_class_embeds": 7}, "expected shape"),
    ("unet/config.json", {"attention_resolutions": [3]}, "attention_resolutions"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": "1000"}, "num_train_timesteps"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": None}, "num_train_timesteps"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": -5}, "num_train_timesteps"),
    ("scheduler/scheduler_config.json", {"beta_start": "x"}, "beta_start"),
    ("scheduler/scheduler_config.json", {"beta_start": float("nan")}, "beta_start"),
    ("scheduler/scheduler_config.json", {"beta_end": 1.5}, "beta_end"),
    ("scheduler/scheduler_config.json", {"beta_schedule": None}, "beta_schedule"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "steep"}, "steep"),
    ("scheduler/scheduler_config.json", {"trained_betas": "abc"}, "Betas must be"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 2.0]}, "Betas must be"),
    ("scheduler/scheduler_config.json", {"clip_sample": "no"}, "clip_sample"),
    ("scheduler/scheduler_config.json", {"clip_sample_range": "1"}, "clip_sample_range"),
    ("scheduler/scheduler_config.json", {"timestep_spacing": 3}, "timestep_spacing"),
    ("model_index.json", {"unet": None}, "unet"),
    ("model_index.json", {"unet": []}, "unet"),
    ("model_index.json", {"unet": "x"}, "unet"),
    ("model_index.json", {"unet": [None, None]}, "unet"),
    ("model_index.json", {"classifier": 3}, "classifier"),
    ("model_index.json", {"unet": ["diffusers_adm.models.noisy_classifier", "NoisyClassifier"]}, "unet/config.json"),
    ("model_index.json", {"scheduler": ["diffusers", "NoSuchScheduler"]}, "NoSuchScheduler"),
    ("model_index.json", {"id2label": [1]}, "id2label"),
    ("model_index.json", {"guidance_scale": "x"}, "guidance_scale"),
    ("model_index.json", {"num_inference_steps": None}, "num_inference_steps"),
]


@pytest.mark.parametrize("name, entry, message", WRONG_ENTRIES)
def test_wrong_entry_of_a_config_is_named(name, entry, message, copy):
    change(copy / name, **entry)
    refused(lambda: ClassifierGuidedPipeline.from_pretrained(copy), str(copy), message)


@pytest.mark.parametrize(
    "cls, place, message",
    [
        (ADMUNet2DModel, ".", "It holds a pipeline"),
        (ADMUNet2DModel, "classifier", "its `_class_name` is 'NoisyClassifier'"),
        (NoisyClassifier, "unet", "its `_class_name` is 'ADMUNet2DModel'"),
        (NoisyClassifier, "scheduler", "has no config.json"),
        (ClassifierGuidedPipeline, "unet", "It holds a model, not a pipeline"),
        (ADMUpsamplePipeline, ".", "This is a saved ClassifierGuidedPipeline"),
    ],
)
def test_folder_of_another_kind_is_refused(cls, place, message, saved):
    refused(lambda: cls.from_pretrained(saved / place), message)


def test_folder_of_a_training_run_names_what_it_holds(saved, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    shutil.copytree(saved, tmp_path / "pipeline")
    refused(lambda: ClassifierGuidedPipeline.from_pretrained(tmp_path), f"Pass {str(tmp_path / 'pipeline')!r}")
    shutil.rmtree(tmp_path / "pipeline" / "classifier")
    refused(
        lambda: NoisyClassifier.from_pretrained(tmp_path / "pipeline", subfolder="classifier"), "has no classifier"
    )


@pytest.mark.parametrize("cls", [ADMUNet2DModel, NoisyClassifier, ClassifierGuidedPipeline, ADMUpsamplePipeline])
def test_what_is_neither_a_folder_nor_an_id_is_refused(cls, tmp_path):
    for place in (None, 5, "", str(tmp_path / "nowhere"), tmp_path / "nowhere", "no/such/folder"):
        refused(lambda place=place: cls.from_pretrained(place), "on the Hub")


def test_missing_variant_is_named(saved):
    refused(lambda: ADMUNet2DModel.from_pretrained(saved / "unet", variant="fp16"), "fp16.safetensors")


def test_damaged_part_that_is_given_instead_is_not_read(copy):
    (copy / "unet" / "config.json").write_text("[]")
    (copy / "scheduler" / "scheduler_config.json").write_text("[]")
    pipeline = ClassifierGuidedPipeline.from_pretrained(copy, unet=tiny_unet(), scheduler=tiny_scheduler())
    assert pipeline.classifier is not None


def test_derived_class_loads_by_its_base_and_by_itself(tmp_path):
    class MyUNet(ADMUNet2DModel):
        pass

    MyUNet(**{name: value for name, value in tiny_unet().config.items() if name[0] != "_"}).save_pretrained(tmp_path)
    assert type(MyUNet.from_pretrained(tmp_path)) is MyUNet
    assert type(ADMUNet2DModel.from_pretrained(tmp_path)) is ADMUNet2DModel


def test_command_ends_in_one_line(copy, tmp_path, capsys):
    change(copy / "unet" / "config.json", sample_size="8")
    arguments = ["sample", "--model", str(copy), "--output", str(tmp_path / "samples"), "--num_samples", "1"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # after a progress bar
    assert "unet/config.json" in error and "sample_size" in error
