"""Models that training starts from: folders, files, other channels and resolutions, and adapters on them."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import draw_parameters
from training_runs import checkpoint_tensors, classifier_args, unet_args

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.models import ADMUNet2DModel, NoisyClassifier
from diffusers_adm.training import train_classifier, train_unet
from diffusers_adm.training.objective import build_noise_scheduler
from diffusers_adm.training.pretrained import load_pretrained
from diffusers_adm.training.setup import build_unet


FLAGS = (
    "--image_size 16 --num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --attention_resolutions 8 --num_head_channels 8"
    " --resblock_updown True --use_scale_shift_norm True --noise_schedule cosine"
)


@pytest.fixture
def start(dataset, tmp_path):
    """Saves a pipeline to start from, whose UNet differs from that of the run by the given arguments."""

    def save(**changes):
        options = unet_args(dataset, tmp_path, 1)
        unet = draw_parameters(build_unet(options, num_classes=2))
        unet = draw_parameters(ADMUNet2DModel.from_config({**unet.config, **changes}), seed=4)
        ClassifierGuidedPipeline(unet, build_noise_scheduler(options.diffusion)).save_pretrained(tmp_path / "start")
        return unet.eval()

    return save


def train(dataset, tmp_path, *more, steps=1, name="run"):
    options = ["--pretrained_model_name_or_path", str(tmp_path / "start"), *map(str, more)]
    train_unet.main(unet_args(dataset, tmp_path / name, steps, *options))
    return tmp_path / name


def draw(pipeline):
    return pipeline(
        class_labels=[0, 1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images


def test_new_channels_begin_at_zero(start, dataset, tmp_path):
    unet = start(in_channels=2, out_channels=4)
    more = "--learning_rate", 0, "--in_channels", 3
    folder = train(dataset, tmp_path, *more)
    wide = ADMUNet2DModel.from_pretrained(folder / "pipeline", subfolder="unet").eval()
    sample = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    mean, log_variance = wide(sample, 5, labels).sample.chunk(2, dim=1)
    expected_mean, expected_log_variance = unet(sample[:, :2], 5, labels).sample.chunk(2, dim=1)
    torch.testing.assert_close(mean, torch.nn.functional.pad(expected_mean, (0, 0, 0, 0, 0, 1)))
    torch.testing.assert_close(log_variance[:, :2], expected_log_variance)


def test_another_resolution_keeps_layers_and_is_said(start, dataset, tmp_path, caplog):
    unet = start(sample_size=8, attention_resolutions=(4,))
    folder = train(dataset, tmp_path, "--learning_rate", 0)
    trained = load_file(folder / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(tensor, trained[key]) for key, tensor in unet.state_dict().items())
    assert "sample_size 16 instead of 8" in caplog.text
    start(sample_size=8, attention_resolutions=(8,))
    with pytest.raises(ValueError, match=r"attention_resolutions \[16.0\] instead of \[8\]"):
        train(dataset, tmp_path, name="other")


@pytest.mark.parametrize(("dropout", "num_classes", "said"), [("0", 2, True), ("0.1", 2, False), ("0", None, False)])
def test_null_class_that_is_left_out_is_named(start, dropout, num_classes, said, dataset, tmp_path, caplog):
    start(use_null_class=True)
    unet = build_unet(unet_args(dataset, tmp_path, 1, "--label_dropout", dropout), num_classes)
    load_pretrained(unet, str(tmp_path / "start"))
    assert ("To keep it, pass --label_dropout" in caplog.text) == said


@pytest.mark.parametrize(("theirs", "num_classes", "dropout"), [((2, True), 3, "0"), ((3, False), 2, "0.1")])
def test_embeddings_of_other_classes_begin_at_random(start, theirs, num_classes, dropout, dataset, tmp_path, caplog):
    """The tables have the same shape, but their rows are other classes, or the null class."""
    unet = start(num_class_embeds=theirs[0], use_null_class=theirs[1])
    new = build_unet(unet_args(dataset, tmp_path, 1, "--label_dropout", dropout), num_classes)
    assert new.class_embedding.weight.shape == unet.class_embedding.weight.shape
    before = new.class_embedding.weight.clone()
    load_pretrained(new, str(tmp_path / "start"))
    assert torch.equal(new.class_embedding.weight, before)
    assert "class_embedding.weight begin at random values" in caplog.text


def test_another_prediction_is_said(start, dataset, tmp_path, caplog):
    start()
    train(dataset, tmp_path, "--prediction_type", "sample")
    assert "was trained with --prediction_type epsilon, but this run has sample" in caplog.text


def test_plan_of_an_adapter_leaves_the_model_as_it_is(start, dataset, tmp_path, capsys):
    start()
    train(dataset, tmp_path, "--lora_rank", 2, "--dry_run")
    assert "million are trained" in capsys.readouterr().out


def test_card_names_the_start(start, dataset, tmp_path):
    start()
    card = (train(dataset, tmp_path) / "pipeline" / "README.md").read_text()
    assert "Training started from the weights of `start`" in card and str(tmp_path) not in card
    assert f"from `{dataset.name}`" in card and str(dataset) not in card
    train_unet.main(
        unet_args(dataset, tmp_path / "new", 1)
    )  # a resumed run may lack the option too, so nothing is said
    assert "Training started" not in (tmp_path / "new" / "pipeline" / "README.md").read_text()


def test_numbers_of_blocks_of_each_level_are_an_option(start, dataset, tmp_path):
    start(layers_per_block=(1, 2))
    with pytest.raises(ValueError, match=r"layers_per_block \[1, 2\] instead of 1"):
        train(dataset, tmp_path)
    folder = train(dataset, tmp_path, "--layers_per_block", "1,2")
    assert draw(ClassifierGuidedPipeline.from_pretrained(folder / "pipeline")).shape == (2, 1, 16, 16)
    options = train_unet.parse_args(["--config", str(folder / "checkpoint-1" / "options.yaml")])
    assert options.architecture.layers_per_block == (1, 2)


def test_rescaled_timesteps_are_an_option(start, dataset, tmp_path):
    start(timestep_scale=0.25)
    with pytest.raises(ValueError, match="timestep_scale 0.25 instead of 1.0"):
        train(dataset, tmp_path)
    folder = train(dataset, tmp_path, "--timestep_scale", 0.25)
    assert ADMUNet2DModel.from_pretrained(folder / "pipeline", subfolder="unet").config.timestep_scale == 0.25


def test_training_starts_from_a_file_of_the_original_code(dataset, tmp_path):
    wide = "--in_channels 3 --model_channels 32 --norm_num_groups 32 --no-class_conditional --label_dropout 0".split()
    unet = draw_parameters(build_unet(unet_args(dataset, tmp_path, 1, *wide), num_classes=None))
    torch.save(unet.to_openai_state_dict(), tmp_path / "start")
    with pytest.raises(ValueError, match="`flags` are required"):
        train(dataset, tmp_path, *wide)
    folder = train(dataset, tmp_path, *wide, "--learning_rate", 0, "--pretrained_flags", FLAGS)
    trained = load_file(folder / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(tensor, trained[key]) for key, tensor in unet.state_dict().items())
    with pytest.raises(ValueError, match="--pretrained_flags require a .pt file"):
        train(dataset, tmp_path / "nowhere", *wide, "--pretrained_flags", FLAGS)


def test_adapter_is_small_loads_merges_and_resumes_exactly(start, dataset, tmp_path):
    start()
    lora = "--lora_rank", 2, "--learning_rate", 1e-2
    folder = train(dataset, tmp_path, *lora, steps=5)
    again = train(dataset, tmp_path, *lora, steps=3, name="again")
    train(dataset, tmp_path, *lora, "--resume_from_checkpoint", "latest", steps=5, name="again")
    for before, after in zip(*(checkpoint_tensors(run / "checkpoint-5").items() for run in (folder, again))):
        assert all(torch.equal(tensor, after[1][key]) for key, tensor in before[1].items())

    adapter, unet = (folder / "pipeline" / name for name in ("lora", "unet"))
    sizes = [next(place.glob("*.safetensors")).stat().st_size for place in (adapter, unet)]
    assert sizes[0] < sizes[1]

    first = ClassifierGuidedPipeline.from_pretrained(tmp_path / "start")
    merged = ClassifierGuidedPipeline.from_pretrained(folder / "pipeline")
    frozen = first.unet.up_blocks[0].resnet.conv1.weight.clone()
    without = draw(first)
    first.unet.load_lora_adapter(folder / "pipeline" / "lora")
    assert not torch.allclose(draw(first), without, atol=1e-3)
    torch.testing.assert_close(draw(first), draw(merged), atol=1e-4, rtol=1e-4)
    assert torch.equal(first.unet.up_blocks[0].resnet.conv1.base_layer.weight, frozen)
    first.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        draw(ClassifierGuidedPipeline.from_pretrained(tmp_path / "saved")), draw(merged), atol=1e-4, rtol=1e-4
    )


def test_classifier_takes_an_adapter(dataset, tmp_path):
    train_classifier.main(classifier_args(dataset, tmp_path / "first", 1))
    more = "--lora_rank", "2", "--pretrained_model_name_or_path", str(tmp_path / "first" / "classifier")
    train_classifier.main(classifier_args(dataset, tmp_path / "second", 1, *more))
    classifier = NoisyClassifier.from_pretrained(tmp_path / "first" / "classifier")
    classifier.load_lora_adapter(tmp_path / "second" / "classifier" / "lora")
    merged = NoisyClassifier.from_pretrained(tmp_path / "second" / "classifier")
    sample = torch.ones(2, 1, 16, 16)
    torch.testing.assert_close(classifier(sample, 5).logits, merged(sample, 5).logits)


@pytest.mark.parametrize("more", [["--lora_rank", "2"], ["--lora_rank", "0"]])
def test_adapter_of_nothing_is_refused(more, dataset, tmp_path):
    with pytest.raises(ValueError, match="--lora_rank"):
        train_unet.main(unet_args(dataset, tmp_path, 1, *more))
