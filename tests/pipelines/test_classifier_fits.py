"""A classifier must fit the UNet: the same images, noise and classes. It may supply the names of the classes."""

import dataclasses
import json

import pytest
from golden_cases import draw_weights, load_case, published_flags
from tiny_models import tiny_classifier, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.openai.checkpoints import PublishedCheckpoint
from diffusers_adm.training.pretrained import load_pretrained


NAMES = dict(enumerate(("tench", "goldfish, carp", "great white shark", "hammerhead", "ray")))


def test_names_are_saved_with_a_classifier_and_used_by_a_pipeline_without_names(tmp_path):
    tiny_classifier(id2label={str(label): name for label, name in NAMES.items()}).save_pretrained(tmp_path / "one")
    classifier = NoisyClassifier.from_pretrained(tmp_path / "one")
    assert classifier.config.id2label == NAMES
    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=None), classifier=classifier)
    assert pipeline.class_ids(["ray", "carp"]) == [4, 1]
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert json.loads((tmp_path / "pipeline" / "model_index.json").read_text())["id2label"] is None
    assert ClassifierGuidedPipeline.from_pretrained(tmp_path / "pipeline").label2id["goldfish"] == [1]
    with pytest.raises(ValueError, match="neither pipeline nor classifier has names"):
        tiny_pipeline().class_ids("ray")


def test_classes_in_another_order_are_refused(tmp_path):
    other = dict(enumerate(["tench", "goldfish", "hammerhead", "great white shark", "ray"]))
    tiny_classifier(id2label=other).save_pretrained(tmp_path)
    message = "class 2 is 'great white shark' for the UNet and 'hammerhead' for the classifier"
    classifier = NoisyClassifier.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(classifier=classifier, id2label=NAMES)
    pipeline = tiny_pipeline(id2label=NAMES)
    pipeline.classifier = classifier
    with pytest.raises(ValueError, match=message):
        pipeline([1], num_inference_steps=2)
    # The cure that the message names.
    assert tiny_pipeline(classifier=NoisyClassifier.from_pretrained(tmp_path, id2label=None), id2label=NAMES)


def test_a_synonym_in_common_is_enough():
    synonyms = {1: "Carassius auratus, Goldfish", 2: "man-eater, great white shark"}
    assert tiny_pipeline(classifier=tiny_classifier(id2label=synonyms), id2label=NAMES).class_ids("carp") == [1]


@pytest.mark.parametrize(
    "id2label", [["tench"], {0.5: "tench"}, {"zero": "tench"}, {-1: "tench"}, {5: "tench"}, {0: 7}], ids=str
)
def test_names_that_are_none_are_refused(id2label):
    with pytest.raises(ValueError, match="`id2label` must"):
        tiny_classifier(id2label=id2label)


@pytest.mark.parametrize(
    ("trained_with", "scheduler"),
    [({"num_train_timesteps": 1000}, {"num_train_timesteps": 4000}), ({"beta_schedule": "squaredcos_cap_v2"}, {})],
    ids=["timesteps", "schedule"],
)
def test_classifier_of_other_noise_is_refused(trained_with, scheduler):
    classifier, scheduler = tiny_classifier(**trained_with), tiny_scheduler(**scheduler)
    with pytest.raises(ValueError, match="would mean other noise levels"):
        tiny_pipeline(scheduler=scheduler, classifier=classifier)
    fitting = tiny_scheduler(**(scheduler.config | trained_with))
    assert tiny_pipeline(scheduler=fitting, classifier=classifier)


def test_released_classifier_guides_four_thousand_steps_only_if_they_are_rescaled():
    unet, classifier = load_case("unet_class_conditional")[0], load_case("classifier_attention")[0]
    flags = f"{published_flags(unet)} {published_flags(classifier)} --diffusion_steps 4000 --rescale_timesteps"

    def assemble(rescaled):
        published = PublishedCheckpoint(draw_weights(unet), f"{flags} {rescaled}")
        released = published.classifier(draw_weights(classifier))
        released.released = dataclasses.replace(PublishedCheckpoint("256x256_classifier.pt").released, layout=None)
        return ClassifierGuidedPipeline.from_openai(published, released)

    assert assemble(True).classifier.config.timestep_scale == 0.25
    with pytest.raises(ValueError, match="trained with num_train_timesteps=1000, but the scheduler has 4000"):
        assemble(False)


def test_training_may_start_from_a_classifier_of_other_names_and_noise(tmp_path):
    tiny_classifier(id2label=NAMES, num_train_timesteps=1000).save_pretrained(tmp_path)
    model = tiny_classifier(seed=3, id2label={0: "cat"}, num_train_timesteps=4000)
    load_pretrained(model, str(tmp_path), None)
    saved = NoisyClassifier.from_pretrained(tmp_path).state_dict()
    assert all(tensor.equal(saved[name]) for name, tensor in model.state_dict().items())
