"""`diffusers-adm convert`."""

import subprocess
import sys

import pytest
import torch
from command_line import run
from golden_cases import (
    RELEASED,
    draw_weights,
    load,
    load_case,
    model_class,
    published_flags,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline
from diffusers_adm.cli import main


def test_convert_writes_a_pipeline_that_equals_the_checkpoints(pipeline_files, tmp_path, capsys):
    unet, classifier, flags = pipeline_files
    output = tmp_path / "converted" / "pipeline"
    words = ["convert", "--unet", str(unet), "--classifier", str(classifier), "--flags", flags]
    assert main([*words, "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    saved = ClassifierGuidedPipeline.from_pretrained(output)
    direct = ClassifierGuidedPipeline.from_openai(unet, classifier, flags)
    sample, timestep, labels = torch.randn(2, 3, 32, 32), torch.tensor([10, 900]), torch.tensor([3, 4])
    with torch.no_grad():
        assert torch.equal(saved.unet(sample, timestep, labels).sample, direct.unet(sample, timestep, labels).sample)
        assert torch.equal(saved.classifier(sample, timestep).logits, direct.classifier(sample, timestep).logits)
    public = {name: value for name, value in direct.scheduler.config.items() if not name.startswith("_")}
    assert public.items() <= dict(saved.scheduler.config).items()
    assert list(output.parent.iterdir()) == [output]  # nothing unfinished is left beside it
    assert ModelCard.load(output / "README.md").data.model_name == "pipeline"


def test_convert_casts_and_names_a_variant(pipeline_files, tmp_path):
    unet, classifier, flags = pipeline_files
    before = unet.read_bytes()
    (tmp_path / "out").mkdir()  # a folder that is empty may be there
    words = ["convert", "--unet", str(unet), "--classifier", str(classifier), "--flags", flags]
    assert main([*words, "--output", str(tmp_path / "out"), "--dtype", "float16", "--variant", "fp16"]) == 0
    saved = ClassifierGuidedPipeline.from_pretrained(tmp_path / "out", variant="fp16", dtype=torch.float16)
    expected = ClassifierGuidedPipeline.from_openai(unet, classifier, flags).to(torch.float16)
    for model, other in ((saved.unet, expected.unet), (saved.classifier, expected.classifier)):
        for name, parameter in other.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), name
    assert unet.read_bytes() == before


def test_convert_refuses_weights_that_are_too_large_for_the_data_type(tmp_path, capsys):
    description, _ = load_case("classifier_spatial")
    weights = draw_weights(description)
    weights["out.2.bias"][0] = 1e6
    torch.save(weights, tmp_path / "model.pt")
    words = ["convert", "--classifier", tmp_path / "model.pt", "--flags", published_flags(description)]
    assert run(*words, "--dtype", "float16", "--output", tmp_path / "half") == 2
    error = capsys.readouterr().err
    assert "pooling.fc2.bias has 1e+06, and torch.float16 ends at 65504" in error
    assert not (tmp_path / "half").exists()
    assert run(*words, "--dtype", "bfloat16", "--output", tmp_path / "bfloat") == 0
    assert load_file(tmp_path / "bfloat" / "diffusion_pytorch_model.safetensors")["pooling.fc2.bias"].isfinite().all()


@pytest.mark.parametrize(
    "case, option, folder", [("upsampler", "--unet", "unet"), ("classifier_spatial", "--classifier", "")]
)
def test_convert_writes_an_upsampler_or_a_classifier_alone(case, option, folder, tmp_path):
    description, _ = load_case(case)
    torch.save(draw_weights(description), tmp_path / "model.pt")
    flags = published_flags(description) + (" --small_size 8" if case == "upsampler" else "")
    words = ["convert", option, str(tmp_path / "model.pt"), "--flags", flags]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    saved = model_class(case).from_pretrained(tmp_path / "out" / folder).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in load(case).state_dict().items())
    if case == "upsampler":
        assert ADMUpsamplePipeline.from_pretrained(tmp_path / "out").config.low_res_size == 8


def test_convert_says_in_one_line_what_is_wrong(pipeline_files, tmp_path, capsys):
    unet, classifier, flags = pipeline_files
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    for words, message in (
        (["--unet", str(unet), "--output", str(tmp_path / "out")], "`flags` are required"),
        (
            ["--unet", str(tmp_path / "64x64_diffusion.pt"), "--output", str(tmp_path / "out")],
            "Download it from https",
        ),
        (["--unet", str(unet), "--flags", flags, "--output", str(full)], "not an empty folder"),
        (["--unet", str(unet), "--flags", flags, "--output", ""], "argument --output: a value is required"),
        *(
            (
                ["--unet", str(unet), "--variant", name, "--output", str(tmp_path / "out")],
                "The variant must consist of",
            )
            for name in ("a/b", "a b", "..")
        ),
        (["--output", str(tmp_path / "out")], "Nothing to convert"),
    ):
        assert run("convert", *words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert [path.name for path in full.iterdir()] == ["file"]


def test_convert_removes_what_a_killed_conversion_left(tmp_path):
    unfinished = tmp_path / "partial-out" / "unet"
    unfinished.mkdir(parents=True)
    (unfinished / "diffusion_pytorch_model.safetensors").touch()
    words = ["--unet", tmp_path / "64x64_diffusion.pt", "--output", tmp_path / "out"]
    assert run("convert", *words) == 2  # there is no such checkpoint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_convert_needs_little_more_memory_than_the_file_has_bytes(tmp_path, dtype):
    file = tmp_path / "64x64_classifier.pt"
    torch.save({name: torch.zeros(shape) for name, shape in RELEASED[file.name]["parameters"]}, file)
    script = """
import resource, sys
from diffusers_adm.cli import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(sys.argv[1:]) == 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    words = ["convert", "--classifier", str(file), "--output", str(tmp_path / "out"), "--dtype", dtype]
    run = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1]) < 1.3 * file.stat().st_size
