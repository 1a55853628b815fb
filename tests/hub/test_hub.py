"""Saved pipelines load in every way that users try: from folders and from a Hub, with this package and without it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders
from hub_server import TOKEN, HubServer, Repository
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from tiny_models import tiny_classifier, tiny_pipeline

from diffusers_adm import ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.hub.bundle import save_model


# A user of diffusers alone: this package cannot be imported. Each prints what its image sums up to.
WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffusers_adm":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from diffusers import DiffusionPipeline
"""
WITH_PACKAGE = """
import torch
from diffusers import DiffusionPipeline
from diffusers_adm import ADMUNet2DModel, ClassifierGuidedPipeline, NoisyClassifier
"""
DRAW = """
pipe.set_progress_bar_config(disable=True)
image = pipe([1, 2], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent").images
print("drawn", image.double().sum().item().hex())
"""


def drawn(pipeline):
    generator = torch.Generator().manual_seed(0)
    image = pipeline([1, 2], num_inference_steps=3, generator=generator, output_type="latent").images
    return image.double().sum().item().hex()


def run(code, arguments=(), **environment):
    """What a fresh interpreter, on one thread as this test is not, says it has drawn; or its error."""
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd="/", env=env, capture_output=True, text=True
    )
    if finished.returncode != 0:
        return finished.stderr.strip().splitlines()[-1]
    return finished.stdout.rsplit("drawn", 1)[1].strip()


@pytest.fixture
def saved(tmp_path):
    """A pipeline, and the folder where it was saved."""
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "saved")
    return pipeline, tmp_path / "saved"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, and the environment in which a client asks it."""
    server = HubServer()
    environment = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    yield server, environment
    server.shutdown()


# Folders


def test_code_files_need_nothing_of_this_package(saved):
    _, folder = saved
    files = list(folder.rglob("*.py"))
    assert sorted(path.name.rsplit("_", 1)[0] for path in files) == ["noisy_classifier", "pipeline_adm", "unet_adm"]
    for path in files:
        text = path.read_text()
        assert "import diffusers_adm" not in text and "from diffusers_adm" not in text and "from ." not in text


def test_listing_passes_the_check_of_diffusers(saved):
    _, folder = saved
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    index = json.loads((folder / "model_index.json").read_text())
    found, _ = _get_custom_components_and_folders("me/model", index, files)
    assert set(found) == {"unet", "classifier"}
    assert f"{index['_class_name'][0]}.py" in files


def test_folder_loads_without_this_package(saved):
    pipeline, folder = saved
    load = f"pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
    assert run(WITHOUT_PACKAGE + load + DRAW) == drawn(pipeline)
    # What it saves loads again, in both ways.
    again = f"pipe.save_pretrained({str(folder) + '-again'!r})\n"
    load_again = f"pipe = DiffusionPipeline.from_pretrained({str(folder) + '-again'!r}, trust_remote_code=True)\n"
    assert run(WITHOUT_PACKAGE + load + again + load_again + DRAW) == drawn(pipeline)
    assert drawn(ClassifierGuidedPipeline.from_pretrained(f"{folder}-again")) == drawn(pipeline)


@pytest.mark.parametrize("flag", [{}, {"trust_remote_code": True}])
def test_folder_loads_with_the_classes_of_this_package(flag, saved):
    pipeline, folder = saved
    loaded = ClassifierGuidedPipeline.from_pretrained(folder, **flag)
    assert type(loaded) is ClassifierGuidedPipeline
    assert type(loaded.unet) is type(pipeline.unet) and type(loaded.classifier) is type(pipeline.classifier)
    assert drawn(loaded) == drawn(pipeline)


def test_pipeline_of_compiled_models_is_saved_with_their_code(tmp_path):
    pipeline = tiny_pipeline()
    expected = drawn(pipeline)
    pipeline.unet, pipeline.classifier = (torch.compile(one) for one in (pipeline.unet, pipeline.classifier))
    pipeline.save_pretrained(tmp_path)
    load = f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
    assert run(WITHOUT_PACKAGE + load + DRAW) == expected


def test_pipeline_without_a_classifier_loads_in_both_ways(tmp_path):
    pipeline = tiny_pipeline(with_classifier=False)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["classifier"] == [None, None]
    assert ClassifierGuidedPipeline.from_pretrained(tmp_path).classifier is None
    load = f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
    assert run(WITHOUT_PACKAGE + load + DRAW) == drawn(pipeline)


def test_folder_with_this_packages_modules_in_its_index_loads(tmp_path):
    # As version 0.1.0 wrote it, and as the default model's folder is.
    pipeline = tiny_pipeline()
    DiffusionPipeline.save_pretrained(pipeline, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers_adm.models.unet_adm", "ADMUNet2DModel"]
    assert index["classifier"] == ["diffusers_adm.models.noisy_classifier", "NoisyClassifier"]
    assert drawn(ClassifierGuidedPipeline.from_pretrained(tmp_path)) == drawn(pipeline)


def test_another_pipeline_is_refused(saved):
    _, folder = saved
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": ["other", "OtherPipeline"]}))
    with pytest.raises(ValueError, match="OtherPipeline"):
        ClassifierGuidedPipeline.from_pretrained(folder)


def test_saved_models_load_by_their_own_class(saved):
    pipeline, folder = saved
    for name in ("unet", "classifier"):
        model = getattr(pipeline, name)
        loaded = type(model).from_pretrained(folder, subfolder=name)
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


def test_model_alone_loads_without_this_package(tmp_path):
    classifier = tiny_classifier()
    save_model(classifier, tmp_path)
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = classifier(sample, torch.tensor([3, 500])).logits.double().sum().item().hex()
    logits = (
        "model.eval()\nsample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "print('drawn', model(sample, torch.tensor([3, 500])).logits.double().sum().item().hex())\n"
    )
    without = f"from diffusers import AutoModel\nmodel = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
    assert run(WITHOUT_PACKAGE + without + logits) == expected
    loaded = NoisyClassifier.from_pretrained(tmp_path)
    assert "auto_map" not in loaded.config
    assert loaded(sample, torch.tensor([3, 500])).logits.double().sum().item().hex() == expected


# The Hub


def push(environment, folder, repo_id="me/model", **options):
    code = f"pipe = ClassifierGuidedPipeline.from_pretrained({str(folder)!r})\npipe.push_to_hub({repo_id!r}, **{options!r})\n"
    return run(WITH_PACKAGE + code + DRAW, **environment)


def test_pushed_pipeline_loads_in_every_way(saved, hub, tmp_path):
    pipeline, folder = saved
    server, environment = hub
    expected = drawn(pipeline)
    assert push(environment, folder, token=TOKEN, private=True) == expected
    repository = server.repositories["me/model"]
    files = repository.commits[repository.branches["main"]]
    assert repository.private
    assert {name.split("/")[0] for name in files} - {".gitattributes"} == {
        "model_index.json",
        "unet",
        "classifier",
        "scheduler",
        next(name for name in files if name.startswith("pipeline_adm_")),
    }

    token = f"token={TOKEN!r}"
    with_package = f"pipe = ClassifierGuidedPipeline.from_pretrained('me/model', {token})\n"
    assert run(WITH_PACKAGE + with_package + DRAW, **environment) == expected
    # diffusers hands no token on to what fetches code: of a private repository it needs the one that is logged in.
    without = "pipe = DiffusionPipeline.from_pretrained('me/model', trust_remote_code=True)\n"
    assert run(WITHOUT_PACKAGE + without + DRAW, HF_TOKEN=TOKEN, **environment) == expected
    parts = (
        f"unet = ADMUNet2DModel.from_pretrained('me/model', subfolder='unet', {token})\n"
        f"classifier = NoisyClassifier.from_pretrained('me/model', subfolder='classifier', {token})\n"
        f"pipe = ClassifierGuidedPipeline.from_pretrained('me/model', unet=unet, classifier=classifier, {token})\n"
    )
    assert run(WITH_PACKAGE + parts + DRAW, **environment) == expected

    # Offline, from what was downloaded. diffusers asks the Hub for a repository's code in any case, but not for a folder's.
    folder = f"from huggingface_hub import snapshot_download\nfolder = snapshot_download('me/model', {token})\n"
    without = "pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)\n"
    assert run(WITHOUT_PACKAGE + folder + without + DRAW, **environment) == expected
    server.shutdown()
    environment["HF_HUB_OFFLINE"] = "1"
    assert run(WITH_PACKAGE + with_package + DRAW, **environment) == expected
    assert run(WITHOUT_PACKAGE + folder + without + DRAW, **environment) == expected


def test_private_repository_is_refused_without_a_token(saved, hub):
    _, folder = saved
    _, environment = hub
    push(environment, folder, token=TOKEN, private=True)
    load = "pipe = ClassifierGuidedPipeline.from_pretrained('me/model')\n"
    assert run(WITH_PACKAGE + load + DRAW, **environment) == "RepoNotFound"
    assert push(environment, folder, repo_id="me/other") == "InvalidToken"


def test_revisions_variants_and_what_else_lies_in_a_repository(saved, hub):
    pipeline, folder = saved
    server, environment = hub
    push(environment, folder, token=TOKEN)
    push(environment, folder, token=TOKEN, variant="fp16", revision="half")
    repository = server.repositories["me/model"]
    main = dict(repository.commits[repository.branches["main"]])
    half = repository.commits[repository.branches["half"]]
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in half
    clutter = {"checkpoint-5/model.safetensors": b"x", "raw/diffusion_pytorch_model.safetensors": b"x"}
    repository.commit("main", {**main, **half, **clutter})
    server.requests.clear()
    load = "pipe = ClassifierGuidedPipeline.from_pretrained('me/model')\n"
    assert run(WITH_PACKAGE + load + DRAW, **environment) == drawn(pipeline)
    fetched = [
        request for request in server.requests if request.startswith("GET") and request.endswith(".safetensors")
    ]
    assert sorted(path.split("/main/")[-1].split("/", 5)[-1] for path in fetched) == [
        "classifier/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    load = "pipe = ClassifierGuidedPipeline.from_pretrained('me/model', revision='half', variant='fp16')\n"
    assert run(WITH_PACKAGE + load + DRAW, **environment) == drawn(pipeline)
    load = "pipe = ClassifierGuidedPipeline.from_pretrained('me/model', revision='quarter')\n"
    assert "RevisionNotFound" == run(WITH_PACKAGE + load + DRAW, **environment)


def test_two_repositories_of_different_code_live_side_by_side(saved, hub):
    pipeline, folder = saved
    server, environment = hub
    push(environment, folder, token=TOKEN)
    repository = server.repositories["me/model"]
    files = {}
    for name, data in repository.commits[repository.branches["main"]].items():
        # Another version of the code: a network that says the opposite.
        text = data.decode() if name.endswith((".py", "model_index.json")) else None
        if name.startswith("unet/") and text:
            text = text.replace("ADMUNet2DOutput(sample=sample)", "ADMUNet2DOutput(sample=-sample)")
        stem = next(
            name for name in repository.commits[repository.branches["main"]] if name.startswith("unet/unet_adm")
        )
        stem = stem.removeprefix("unet/").removesuffix(".py")
        if text is not None:
            data = text.replace(stem, "unet_adm_0123abcd").encode()
        files[name.replace(stem, "unet_adm_0123abcd")] = data
    server.repositories["me/other"] = other = Repository(private=False)
    other.commit("main", files)
    load = (
        "other = DiffusionPipeline.from_pretrained('me/other', trust_remote_code=True)\n"
        "pipe = DiffusionPipeline.from_pretrained('me/model', trust_remote_code=True)\n"
    )
    assert run(WITHOUT_PACKAGE + load + DRAW, **environment) == drawn(pipeline)
    assert run(WITHOUT_PACKAGE + load + "pipe = other\n" + DRAW, **environment) != drawn(pipeline)


def test_second_push_replaces_the_code_and_keeps_the_card(saved, hub):
    pipeline, folder = saved
    server, environment = hub
    push(environment, folder, token=TOKEN)
    repository = server.repositories["me/model"]
    files = dict(repository.commits[repository.branches["main"]])
    repository.commit("main", {**files, "README.md": b"mine", "unet/unet_adm_00000000.py": b"old"})
    # The second time as `save_pretrained` does it.
    saves = f"pipe = ClassifierGuidedPipeline.from_pretrained({str(folder)!r})\n"
    saves += f"pipe.save_pretrained({str(folder) + '-2'!r}, push_to_hub=True, repo_id='me/model', token={TOKEN!r})\n"
    before = repository.branches["main"]
    assert run(WITH_PACKAGE + saves + DRAW, **environment) == drawn(pipeline)
    assert repository.branches["main"] != before
    files = repository.commits[repository.branches["main"]]
    assert files["README.md"] == b"mine"
    assert sum(name.endswith(".py") for name in files) == 3 and "unet/unet_adm_00000000.py" not in files


# Training


TRAIN = """
import sys
from diffusers_adm.training import train_classifier, train_unet, train_upsampler
script = {"unet": train_unet, "upsampler": train_upsampler, "classifier": train_classifier}[sys.argv[1]]
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
    assert "the Hub refuses --hub_model_id me/trained" in train("unet", images, environment, *token)
    assert not (images.parent / "unet").exists()
