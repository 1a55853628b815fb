"""Exported files compute the outputs of the networks, and have cards that describe them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import run
from hub_server import HubServer, Repository
from model_calls import LABELS, TIMESTEPS, predict
from peft import LoraConfig
from tiny_models import NUM_CLASSES, draw_parameters, images, tiny_classifier, tiny_pipeline, tiny_unet

from diffusers_adm import default_model
from diffusers_adm.export import export_network
from diffusers_adm.export.cards import source_card
from diffusers_adm.export.networks import example_inputs, largest_difference, open_program
from diffusers_adm.export.sources import load_network
from diffusers_adm.guidance import classifier_gradient


NETWORKS = {
    "unet": tiny_unet(use_null_class=True),
    "attention": tiny_classifier("attention"),
    "unconditional": tiny_unet(num_class_embeds=None, downsample_type="conv", upsample_type="conv", out_channels=3),
    "one level": tiny_unet(channel_mult=(1,), attention_resolutions=(8,)),
    "upsampler": tiny_unet(low_res_conditioning=True),
    "edm": tiny_unet(out_channels=3, preconditioning="edm"),
    "consistency": tiny_unet(out_channels=3, preconditioning="consistency", num_class_embeds=None),
    "adaptive": tiny_classifier("adaptive"),
    "spatial": tiny_classifier("spatial_v2"),
}
QUICK = ("unet", "attention")
CASES = [
    pytest.param(format, kind, marks=[] if kind in QUICK else pytest.mark.slow)
    for format in ("onnx", "torch-export")
    for kind in NETWORKS
]


def input_cases(kind: str) -> list[dict[str, torch.Tensor]]:
    """Inputs with other batch sizes and image sizes than the traced ones, and all timesteps and labels."""
    cases = []
    for batch, height, width in ((1, 8, 8), (5, 8, 8)) + (() if kind == "attention" else ((2, 4, 4), (3, 12, 16))):
        inputs = example_inputs(NETWORKS[kind], batch, height, width)
        inputs["timestep"] = torch.tensor([999.0, 500.5, 20.0, 1.0, 0.1])[:batch]
        if "class_labels" in inputs:
            last = NETWORKS[kind].class_embedding.num_embeddings - 1  # the null class, where there is one
            inputs["class_labels"] = torch.tensor([last, 0, 1, 2, 3])[:batch]
        if "low_res" in inputs:
            inputs["low_res"] = images(batch, height=5, width=3)
        cases.append(inputs)
    return cases


@pytest.mark.parametrize(("format", "kind"), CASES)
def test_exported_network_equals_the_network(format, kind, tmp_path, capfd):
    pytest.importorskip("onnxruntime") if format == "onnx" else None
    network = NETWORKS[kind]
    assert export_network(network, tmp_path / "a" / "b", format, check=False) is None
    program = open_program(tmp_path / "a" / "b" / ("model.onnx" if format == "onnx" else "model.pt2"))
    with torch.no_grad():
        for inputs in input_cases(kind):
            torch.testing.assert_close(program(inputs), network(**inputs, return_dict=False)[0], rtol=1e-4, atol=1e-5)
    assert capfd.readouterr() == ("", "")


def test_program_of_a_classifier_has_its_gradient(tmp_path):
    classifier = NETWORKS["attention"]
    export_network(classifier, tmp_path / "exported", "torch-export", check=False)
    program = open_program(tmp_path / "exported" / "model.pt2")

    def chosen(sample):
        return program({"sample": sample, "timestep": TIMESTEPS.float()}).log_softmax(1)[torch.arange(2), LABELS].sum()

    sample = images().requires_grad_()
    (gradient,) = torch.autograd.grad(chosen(sample), sample)
    torch.testing.assert_close(gradient, classifier_gradient(classifier, images(), TIMESTEPS, LABELS))


def test_file_beyond_the_limit_of_protobuf_has_its_weights_beside_it(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1000)
    assert export_network(NETWORKS["attention"], tmp_path / "exported") < 1e-5
    assert (tmp_path / "exported" / "model.onnx.data").is_file()
    shutil.move(tmp_path / "exported", tmp_path / "moved")
    program = open_program(tmp_path / "moved" / "model.onnx")
    assert largest_difference(NETWORKS["attention"], program) < 1e-5


def test_adapters_are_merged_into_the_file_alone(tmp_path):
    network = tiny_classifier("attention")
    plain = predict(network)
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_qkv", "conv1"]))
    draw_parameters(network)
    adapted = predict(network)
    assert (adapted - plain).abs().max() > 0.1
    export_network(network, tmp_path / "exported", "torch-export")
    output = open_program(tmp_path / "exported" / "model.pt2")({"sample": images(), "timestep": TIMESTEPS.float()})
    torch.testing.assert_close(output, adapted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(predict(network), adapted)


def test_card_of_a_folder_around_the_network_is_not_its_card(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "mine")
    (tmp_path / "README.md").write_text("A project.")
    assert source_card(load_network(str(tmp_path / "mine"))) is None


def test_what_is_no_network_is_refused(tmp_path):
    for network in ("abc", torch.nn.Linear(1, 1)):
        with pytest.raises(
            ValueError, match=f"must be an ADMUNet2DModel or a NoisyClassifier, but got {type(network).__name__}"
        ):
            export_network(network, tmp_path / "new", "torch-export")


def test_program_of_another_network_is_refused():
    other = tiny_classifier("attention", seed=2)
    with pytest.raises(ValueError, match="differs from the network by"):
        largest_difference(NETWORKS["attention"], lambda inputs: other(**inputs).logits)
    with pytest.raises(ValueError, match="differs from the network by nan"):
        largest_difference(NETWORKS["attention"], lambda inputs: other(**inputs).logits * torch.nan)


def test_command_writes_one_network_of_a_pipeline(tmp_path, capsys):
    folder = tmp_path / "exported"
    words = "--format", "torch-export", "--subfolder", "classifier", "--output", folder
    assert run("export", *words) == 0
    assert "Its outputs differ from those of the network by" in capsys.readouterr().out
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "SOURCE_CARD.md",
        "config.json",
        "model.pt2",
    ]
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "| `sample` | batch, 1, 32, 32 | float32 |" in card
    assert (folder / "SOURCE_CARD.md").read_bytes() == Path(default_model(), "README.md").read_bytes()
    assert run("export", *words) == 2
    assert "must be new or empty" in capsys.readouterr().err


def test_command_takes_a_network_by_itself_and_half_precision(tmp_path, capsys):
    NETWORKS["attention"].save_pretrained(tmp_path / "classifier")
    tiny_pipeline(classifier=tiny_classifier("attention").half()).save_pretrained(
        tmp_path / "pipeline", variant="fp16"
    )
    words = "export", "--format", "torch-export", "--no-check"
    assert run(*words, "--model", tmp_path / "classifier", "--output", tmp_path / "a") == 0
    assert "license is not known here" in (tmp_path / "a" / "README.md").read_text()
    assert (
        run(
            *words,
            "--model",
            tmp_path / "pipeline",
            "--variant",
            "fp16",
            "--subfolder",
            "classifier",
            "--output",
            tmp_path / "b",
        )
        == 0
    )
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--model", "nowhere"], "must be a folder or a repository on the Hub, but got 'nowhere'"),
        (["--model", "pipeline", "--subfolder", "classifier"], "has no config.json"),
        (["--model", "pipeline/scheduler"], "config.json"),
        (["--model", "pipeline/unet", "--subfolder", "classifier"], "--subfolder classifier requires a pipeline"),
        (["--model", "released:nothing"], "nothing"),
        (["--model", "released:imagenet-64-classifier", "--subfolder", "unet"], "is a classifier"),
        (["--model", "released:lsun-cat", "--subfolder", "classifier"], "has no classifier"),
        (["--model", "released:imagenet-64", "--revision", "main"], "--revision"),
        (["--output", "pipeline"], "must be new or empty"),
    ],
)
def test_unusable_input_is_reported_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline(with_classifier=False).save_pretrained("pipeline")
    assert run("export", "--format", "torch-export", "--output", "new", *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline"]


def test_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`format` must be one of onnx, torch-export, but got 'tflite'"):
        export_network(tiny_unet(num_class_embeds=NUM_CLASSES), tmp_path / "exported", "tflite")


def test_command_downloads_one_network_from_the_hub(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    files = [file for file in (tmp_path / "pipeline").rglob("*") if file.is_file()]
    server = HubServer()
    server.repositories["me/model"] = Repository(private=False)
    server.repositories["me/model"].commit(
        "main", {str(file.relative_to(tmp_path / "pipeline")): file.read_bytes() for file in files}
    )
    command = "export --format torch-export --no-check --subfolder classifier --output exported --model".split()
    script = (
        f"from diffusers_adm.cli import main\nprint([main([*{command}, name]) for name in ('me/nothing', 'me/model')])"
    )
    environment = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "TQDM_DISABLE": "1",
    }
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True
    )
    server.shutdown()
    assert finished.stdout.endswith("[2, 0]\n"), finished
    assert finished.stderr.count("\n") == 1 and "must be a folder or a repository on the Hub" in finished.stderr
    assert (tmp_path / "exported" / "SOURCE_CARD.md").is_file()
    weights = [name for name in server.requests if name.startswith("GET") and name.endswith(".safetensors")]
    assert len(weights) == 1 and "classifier" in weights[0]
