"""Trainings push what they have trained, and nothing else."""

import json

import pytest
from fresh_interpreters import WITH_PACKAGE, WITHOUT_PACKAGE, run
from hub_server import TOKEN, Repository
from huggingface_hub import ModelCard
from PIL import Image as PILImage


TRAIN = """
import sys
from importlib import import_module
script = import_module(f"diffusers_adm.training.train_{sys.argv[1]}")
try:
    script.main(script.parse_args(sys.argv[2:]))
    print("drawn ended")
except ValueError as error:
    print("drawn", error)
"""
OPTIONS = (
    "--resolution 16 --crop center --model_channels 8 --channel_mult 1,2 --layers_per_block 1 --attention_resolutions 8"
    " --attention_head_dim 8 --norm_num_groups 4 --noise_schedule cosine --train_batch_size 4 --max_train_steps 2"
    " --checkpointing_steps 1 --hub_retry_seconds 0.1 --push_to_hub --hub_model_id me/trained"
).split()


@pytest.fixture
def images(tmp_path):
    """A folder of images in two classes."""
    for label, name in enumerate(("black", "white")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            PILImage.new("RGB", (16, 16), (200 * label + i,) * 3).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def train(script, images, environment, *more):
    words = [script, "--train_data_dir", str(images), "--output_dir", str(images.parent / script), *OPTIONS, *more]
    return run(TRAIN, arguments=words, **environment)


def test_training_pushes_the_pipeline_and_nothing_else(images, hub):
    server, environment = hub
    server.fail_commits = 1  # the first attempt
    more = ["--ema_decay", "0.5,0.9", "--num_validation_images", "2", "--hub_token", TOKEN]
    assert train("unet", images, environment, *more) == "ended"
    repository = server.repositories["me/trained"]
    files = repository.commits[repository.branches["main"]]
    assert not any(
        "checkpoint" in name or "ema" in name or name.endswith((".pkl", ".bin", ".jsonl")) for name in files
    )
    assert {"model_index.json", "README.md", "samples/grid.png"} <= files.keys()
    card = files["README.md"].decode()
    assert "2 classes: black, white" in card and "2 steps of 4 images" in card and TOKEN not in card
    assert ModelCard(card).data.library_name == "diffusers"
    draw = "image = pipe(['black'], num_inference_steps=2).images[0]\nprint('drawn', *image.size)\n"
    with_package = "pipe = ClassifierGuidedPipeline.from_pretrained('me/trained')\n"
    without = "pipe = DiffusionPipeline.from_pretrained('me/trained', trust_remote_code=True)\n"
    assert run(WITH_PACKAGE + with_package + draw, **environment) == "16 16"
    assert run(WITHOUT_PACKAGE + without + draw, **environment) == "16 16"


@pytest.mark.slow
def test_trained_upsampler_is_pushed_and_loads_without_this_package(images, hub):
    server, environment = hub
    more = ["--ema_decay", "0.5", "--num_validation_images", "2", "--low_resolution", "4", "--hub_token", TOKEN]
    assert train("upsampler", images, environment, *more) == "ended"
    repository = server.repositories["me/trained"]
    files = repository.commits[repository.branches["main"]]
    assert sum(name.endswith(".py") for name in files) == 2
    card = files["README.md"].decode()
    assert "pipeline_tag: image-to-image" in card and "ADMUpsamplePipeline.from_pretrained" in card
    draw = (
        "image = pipe(torch.rand(1, 3, 4, 4, generator=torch.manual_seed(0)), ['white'], num_inference_steps=2,"
        " generator=torch.manual_seed(0), output_type='latent').images\nprint('drawn', image.double().sum().item())\n"
    )
    with_package = (
        "from diffusers_adm import ADMUpsamplePipeline\npipe = ADMUpsamplePipeline.from_pretrained('me/trained')\n"
    )
    without = "pipe = DiffusionPipeline.from_pretrained('me/trained', trust_remote_code=True)\n"
    drawn_with = run(WITH_PACKAGE + with_package + draw, **environment)
    assert drawn_with == run(WITHOUT_PACKAGE + without + draw, **environment) and float(drawn_with)


@pytest.mark.slow
def test_trained_consistency_model_is_pushed_and_loads_without_this_package(images, hub):
    server, environment = hub
    more = ["--ema_decay", "0.5", "--num_validation_images", "2", "--hub_token", TOKEN]
    assert train("consistency", images, environment, *more) == "ended"
    repository = server.repositories["me/trained"]
    assert "--closer_every" not in repository.commits[repository.branches["main"]]["README.md"].decode()
    draw = (
        "image = pipe(['white'], generator=torch.manual_seed(0), output_type='latent').images\n"
        "print('drawn', image.double().sum().item())\n"
    )
    with_package = "pipe = ClassifierGuidedPipeline.from_pretrained('me/trained')\n"
    without = "pipe = DiffusionPipeline.from_pretrained('me/trained', trust_remote_code=True)\n"
    drawn_with = run(WITH_PACKAGE + with_package + draw, **environment)
    assert drawn_with == run(WITHOUT_PACKAGE + without + draw, **environment) and float(drawn_with)


@pytest.mark.parametrize("failures", [0, 3])
def test_pipeline_so_far_is_pushed_while_training_goes_on(failures, images, hub):
    server, environment = hub
    more = ["--ema_decay", "0.5", "--num_validation_images", "2", "--validation_steps", "1", "--hub_token", TOKEN]
    server.fail_commits = failures  # all attempts of the first push
    assert train("unet", images, environment, *more, "--push_every", "1") == "ended"
    repository = server.repositories["me/trained"]
    pushes = [files for files in repository.commits.values() if "README.md" in files]
    assert len(pushes) == (1 if failures else 2)
    for steps, files in zip((2, 1), reversed(pushes)):
        assert f"{steps} steps of 4 images" in files["README.md"].decode()
        assert {"model_index.json", "samples/grid.png"} <= files.keys()
    weights = [files["unet/diffusion_pytorch_model.safetensors"] for files in pushes]
    folder = images.parent / "unet"
    assert len(set(weights)) == len(pushes)
    assert weights[-1] == (folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert not list(folder.glob("partial-*"))


def test_failed_push_harms_nothing(images, hub):
    server, environment = hub
    server.fail_commits = 100
    more = ["--validation_fraction", "0.34", "--hub_token", TOKEN, "--hub_revision", "try"]
    assert train("classifier", images, environment, *more) == "ended"
    assert "try" in server.repositories["me/trained"].branches
    folder = images.parent / "classifier" / "classifier"
    assert 'from_pretrained("me/trained", revision="try")' in (folder / "README.md").read_text()
    assert (folder / "diffusion_pytorch_model.safetensors").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "black", "1": "white"}
    assert (config["num_train_timesteps"], config["beta_schedule"]) == (1000, "squaredcos_cap_v2")
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert results and all(result.metric_type == "accuracy" for result in results)


@pytest.mark.parametrize("exists", [False, True], ids=["new repository", "somebody's repository"])
def test_refused_token_is_known_before_the_first_step(exists, images, hub):
    server, environment = hub
    if exists:
        server.repositories["me/trained"] = Repository(private=False)
        server.repositories["me/trained"].commit("main", {})
    token = ["--hub_token", "hf_of_nobody"]
    assert "The Hub refuses --hub_model_id me/trained" in train("unet", images, environment, *token)
    assert [path.name for path in (images.parent / "unet").iterdir()] == [".lock"]
