"""Saved pipelines load in every way that users try: from folders and from a Hub, with this package and without it."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders
from fresh_interpreters import DRAW, WITH_PACKAGE, WITHOUT_PACKAGE, drawn, run
from hub_server import TOKEN, Repository
from huggingface_hub import ModelCard
from tiny_models import tiny_classifier, tiny_pipeline, tiny_unet

from diffusers_adm import ClassifierGuidedPipeline, NoisyClassifier, default_model
from diffusers_adm.hub.bundle import save_model


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
    assert (folder / "README.md").read_bytes() == (folder.parent / "saved-again" / "README.md").read_bytes()


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
        "README.md",
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


@pytest.mark.slow
def test_private_repository_is_refused_without_a_token(saved, hub):
    _, folder = saved
    _, environment = hub
    push(environment, folder, token=TOKEN, private=True)
    load = "pipe = ClassifierGuidedPipeline.from_pretrained('me/model')\n"
    assert run(WITH_PACKAGE + load + DRAW, **environment) == "RepoNotFound"
    assert push(environment, folder, repo_id="me/other") == "InvalidToken"


@pytest.mark.slow
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


@pytest.mark.slow
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
            text = text.replace("ADMUNet2DOutput(sample=output)", "ADMUNet2DOutput(sample=-output)")
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


def test_push_replaces_shards_and_keeps_files_of_the_user(saved, hub, tmp_path):
    pipeline, folder = saved
    server, environment = hub
    sharded = tmp_path / "sharded"
    tiny_pipeline(unet=tiny_unet(seed=9)).save_pretrained(sharded, max_shard_size="20KB")
    kept = {
        "unet/unet_adm_notes.py": b"mine",
        "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
        "small/unet/unet_adm_01234567.py": b"of another pipeline",
        "small/unet/diffusion_pytorch_model.safetensors": b"of another pipeline",
    }
    files = {path.relative_to(sharded).as_posix(): path.read_bytes() for path in sharded.rglob("*") if path.is_file()}
    server.repositories["me/model"] = repository = Repository(private=False)
    repository.commit("main", {".gitattributes": b"", **files, **kept, "unet/unet_adm_01234567.py": b"old"})
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in files
    assert push(environment, folder, token=TOKEN) == drawn(pipeline)
    pushed = repository.commits[repository.branches["main"]]
    assert {name: pushed.get(name) for name in kept} == kept and "unet/unet_adm_01234567.py" not in pushed
    assert not [name for name in pushed if "index" in name and name != "model_index.json" or "-of-" in name]
    load = "pipe = ClassifierGuidedPipeline.from_pretrained('me/model')\n"
    assert run(WITH_PACKAGE + load + DRAW, **environment) == drawn(pipeline)


def test_push_of_a_variant_replaces_its_shards_alone(saved, hub, tmp_path):
    pipeline, folder = saved
    server, environment = hub
    old = tiny_pipeline(unet=tiny_unet(seed=9))
    for variant in (None, "fp16"):
        old.save_pretrained(tmp_path / "old", variant=variant, max_shard_size="20KB")
    files = {
        path.relative_to(tmp_path / "old").as_posix(): path.read_bytes()
        for path in (tmp_path / "old").rglob("*")
        if path.is_file()
    }
    server.repositories["me/model"] = repository = Repository(private=False)
    repository.commit("main", {".gitattributes": b"", **files})
    push(environment, folder, token=TOKEN, variant="fp16")
    load = "pipe = ClassifierGuidedPipeline.from_pretrained('me/model'{})\n"
    assert run(WITH_PACKAGE + load.format(", variant='fp16'") + DRAW, **environment) == drawn(pipeline)
    assert run(WITH_PACKAGE + load.format("") + DRAW, **environment) == drawn(old)


def test_second_save_replaces_the_code_and_keeps_files_of_the_user(saved):
    pipeline, folder = saved
    (folder / "unet" / "unet_adm_notes.py").write_text("mine")
    (folder / "unet" / "unet_adm_01234567.py").write_text("old")
    pipeline.save_pretrained(folder)
    assert (folder / "unet" / "unet_adm_notes.py").read_text() == "mine"
    assert len(list((folder / "unet").glob("*.py"))) == 2


def test_card_and_its_picture_travel_through_the_hub(saved, hub):
    _, folder = saved
    server, environment = hub
    (folder / "README.md").write_text("![a grid](samples/grid.png)")
    (folder / "samples").mkdir()
    (folder / "samples" / "grid.png").write_bytes(b"picture")
    push(environment, folder, token=TOKEN)
    repository = server.repositories["me/model"]
    files = dict(repository.commits[repository.branches["main"]])
    assert (files["README.md"], files["samples/grid.png"]) == (b"![a grid](samples/grid.png)", b"picture")
    # Loaded from the Hub, and pushed to a repository that has a card, and to one that has none.
    server.repositories["me/mine"] = mine = Repository(private=False)
    mine.commit("main", {"README.md": b"mine", "samples/grid.png": b"my picture"})
    load = "pipe = ClassifierGuidedPipeline.from_pretrained('me/model')\n"
    pushes = "".join(f"pipe.push_to_hub('me/{name}', token={TOKEN!r})\n" for name in ("mine", "new"))
    run(WITH_PACKAGE + load + pushes + DRAW, **environment)
    files = mine.commits[mine.branches["main"]]
    assert "model_index.json" in files
    assert (files["README.md"], files["samples/grid.png"]) == (b"mine", b"my picture")
    new = server.repositories["me/new"]
    files = new.commits[new.branches["main"]]
    assert (files["README.md"], files["samples/grid.png"]) == (b"![a grid](samples/grid.png)", b"picture")


def test_card_that_is_made_names_the_repository(tmp_path, hub):
    server, environment = hub
    load = f"pipe = ClassifierGuidedPipeline.from_pretrained({default_model()!r})\n"
    parts = f"pipe = ClassifierGuidedPipeline(**pipe.components)\npipe.push_to_hub('me/made', token={TOKEN!r})\n"
    run(WITH_PACKAGE + load + parts + "print('drawn')\n", **environment)
    repository = server.repositories["me/made"]
    card = repository.commits[repository.branches["main"]]["README.md"].decode()
    assert 'from_pretrained("me/made")' in card and ModelCard(card).data.model_name == "made"
