"""Cards of the released models."""

from pathlib import Path

import torch
from golden_cases import RELEASED
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from tiny_models import tiny_classifier, tiny_pipeline, tiny_unet

from diffusers_adm import (
    ClassifierGuidedPipeline,
    NoisyClassifier,
    default_cascade,
    default_consistency_model,
    default_model,
    default_photo_consistency_model,
    default_photo_model,
)
from diffusers_adm.cli import build_parser, main
from diffusers_adm.hub.bundle import save_model
from diffusers_adm.hub.cards import card_name, released_card
from diffusers_adm.openai.released import RELEASED_CHECKPOINTS, released_checkpoint


def test_cards_of_released_models_are_those_of_the_table():
    folder = Path(__file__).parents[2] / "model_cards"
    for preset in RELEASED_CHECKPOINTS.values():
        card = released_card(preset)
        assert (folder / card_name(preset) / "README.md").read_text() == str(card), "run `make cards`"
        (command,) = [line for line in str(card).splitlines() if line.startswith("diffusers-adm convert")]
        args = build_parser().parse_args(command.split()[1:])
        files = {str(path) for path in (args.unet, args.classifier) if path is not None}
        assert preset.file in files and files <= RELEASED_CHECKPOINTS.keys()
    models = (default_model(), default_photo_model(), default_consistency_model(), default_photo_consistency_model())
    shipped = {Path(model).name for model in (*models, *default_cascade())}
    assert {path.parent.name for path in folder.glob("*/README.md")} == {
        *map(card_name, RELEASED_CHECKPOINTS.values()),
        *shipped,
    }


def test_cards_of_other_checkpoints_say_whose_they_are_and_what_they_are_for():
    card = str(released_card(released_checkpoint("repaint-celebahq")))
    for text in (
        "andreas128/RePaint",
        "License: CC BY-NC-SA 4.0, for non-commercial use.",
        "license: cc-by-nc-sa-4.0",
    ):
        assert text in card
    assert "openai/guided-diffusion" not in card
    card = str(released_card(released_checkpoint("portrait-512")))
    assert "License: not stated." in card and "license: other" in card
    assert "state no limits of use" in card and "b7e8c747af880d44" in card
    for name in ("ct-imagenet-64", "imagenet-64"):
        card = str(released_card(released_checkpoint(name)))
        assert "License: MIT (code). No license of the weights is published." in card and "license: other" in card
        assert f"{released_checkpoint(name).code}/blob/main/model-card.md) allows use for research" in card


def test_command_of_a_card_converts_and_leaves_the_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset = RELEASED_CHECKPOINTS["64x64_classifier.pt"]
    state_dict = {name: torch.zeros(shape) for name, shape in RELEASED[preset.file]["parameters"]}
    torch.save({name: tensor.half() for name, tensor in state_dict.items()}, preset.file)
    (command,) = [line for line in str(released_card(preset)).splitlines() if line.startswith("diffusers-adm convert")]
    assert main(command.split()[1:]) == 0
    assert (tmp_path / card_name(preset) / "README.md").read_text() == str(released_card(preset))


def test_card_is_made_from_the_config(tmp_path):
    classifier = tiny_classifier(id2label={0: "cat", 1: "jack-o'-lantern", 2: "a|b"})
    tiny_pipeline(tiny_unet(num_class_embeds=None), classifier=classifier).save_pretrained(tmp_path / "pets")
    card = ModelCard.load(tmp_path / "pets" / "README.md")
    assert (card.data.model_name, card.data.pipeline_tag) == ("pets", "unconditional-image-generation")
    text = str(card)
    assert "| Classes | 5 |" in text and r"| Names of classes | cat, jack-o'-lantern, a\|b |" in text
    assert 'ClassifierGuidedPipeline.from_pretrained("pets")\nimage = model(class_labels=["cat"]).images[0]' in text
    for name, model in (("classifier", classifier), ("unet", tiny_unet())):
        save_model(model, tmp_path / name)
        assert f'{type(model).__name__}.from_pretrained("{name}")' in (tmp_path / name / "README.md").read_text()


def test_card_travels_with_its_pictures_and_nothing_else(tmp_path, monkeypatch):
    tiny_pipeline().save_pretrained(tmp_path / "one")
    for name in ("one/samples/grid.png", "secret.png", "one/other.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PILImage.new("L", (2, 2)).save(tmp_path / name)
    card = f"![grid](samples/grid.png) ![](../secret.png) ![]({tmp_path}/secret.png) ![](absent.png) [](other.png)"
    (tmp_path / "one" / "README.md").write_text(card)
    monkeypatch.chdir(tmp_path)
    pipeline = ClassifierGuidedPipeline.from_pretrained("one")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pipeline.save_pretrained("two")
    assert Path("two/README.md").read_text() == card
    pictures = {str(path) for path in tmp_path.rglob("*.png") if "one" not in path.parts}
    assert pictures == {str(tmp_path / "secret.png"), str(tmp_path / "elsewhere" / "two" / "samples" / "grid.png")}


def test_card_in_the_current_folder_is_not_that_of_a_new_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained(".")
    Path("README.md").write_text("The card of a model that was downloaded here.")
    tiny_pipeline().save_pretrained("out")
    assert "downloaded" not in Path("out/README.md").read_text()


def test_card_of_a_pipeline_without_classifier_is_not_that_of_one_with_a_classifier(tmp_path):
    tiny_pipeline(with_classifier=False).save_pretrained(tmp_path / "unet")
    (tmp_path / "unet" / "README.md").write_text("trained without")
    pipeline = ClassifierGuidedPipeline.from_pretrained(tmp_path / "unet", classifier=tiny_classifier())
    pipeline.save_pretrained(tmp_path / "both")
    card = (tmp_path / "both" / "README.md").read_text()
    assert "trained without" not in card and "Parameters of the classifier" in card
    (tmp_path / "both" / "README.md").write_text("trained with")
    for name, replaced in (("same", {}), ("other", {"classifier": tiny_classifier(seed=5)})):
        ClassifierGuidedPipeline.from_pretrained(tmp_path / "both", **replaced).save_pretrained(tmp_path / name)
        assert ("trained with" in (tmp_path / name / "README.md").read_text()) is (not replaced)


def test_card_that_a_folder_has_is_kept(tmp_path):
    pipeline = tiny_pipeline()
    (tmp_path / "README.md").write_text("mine")
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_card_of_a_trained_classifier_travels_and_that_of_a_pipeline_is_not_its_parts(tmp_path):
    save_model(tiny_classifier(), tmp_path / "classifier")
    (tmp_path / "classifier" / "README.md").write_text("trained")
    classifier = NoisyClassifier.from_pretrained(tmp_path / "classifier")
    save_model(classifier, tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == "trained"
    tiny_pipeline(classifier=classifier).save_pretrained(tmp_path / "pipeline")
    part = NoisyClassifier.from_pretrained(tmp_path / "pipeline", subfolder="classifier")
    save_model(part, tmp_path / "part")
    assert "NoisyClassifier.from_pretrained" in (tmp_path / "part" / "README.md").read_text()
