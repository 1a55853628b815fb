"""Commands with invalid input: one clear line, a non-zero exit code, and no written files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from digit_features import NAME as DIGITS
from image_files import digits_npz, random_images
from PIL import Image
from tiny_models import tiny_pipeline

from diffusers_adm import __version__, default_cascade
from diffusers_adm.cli import main


SAMPLE = ("sample", "--output", "new", "--num_samples", 4, "--batch_size", 2)
EVALUATE = ("evaluate", "reference.npz", "drawn.npz", "--feature_extractor", DIGITS)
NLL = ("nll", "drawn.npz", "--output", "new")
SWEEP = ("sweep", "reference.npz", "--output", "new", "--feature_extractor", DIGITS)
MAKE = ("make-reference", "drawn.npz", "new.npz", "--feature_extractor", DIGITS)


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(random_images(1, seed)[0, ..., 0]).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of good and bad files."""
    folder = tmp_path_factory.mktemp("bad")
    tiny_pipeline(num_inference_steps=2).save_pretrained(folder / "tiny")
    digits_npz(folder / "drawn.npz", random_images(8))
    digits_npz(folder / "large.npz", random_images(8))
    assert run("make-reference", folder / "drawn.npz", folder / "reference.npz", "--feature_extractor", DIGITS) == 0
    with np.load(folder / "reference.npz") as arrays:
        arrays = dict(arrays)
    asymmetric, sigma = arrays["sigma"].copy(), arrays["sigma"]
    asymmetric[0, 1] += 1
    for name, changed in {
        "nan": {"mu": arrays["mu"] * np.nan},
        "infinite": {"sigma": np.full_like(sigma, np.inf)},
        "complex": {"sigma": sigma + 1j},
        "asymmetric": {"sigma": asymmetric},
        "negative": {"sigma": -sigma},
        "spatial": {"sigma_s": arrays["sigma_s"] * np.nan},
        "huge": {"mu": arrays["mu"] + 1e200},
        "uncounted": {"metadata": np.array(f'{{"feature_extractor": "{DIGITS}", "num_images": "many"}}')},
    }.items():
        np.savez(folder / f"{name}.npz", **{**arrays, **changed})
    for name, text in {
        "file": "x",
        "syntax.py": "def f(:",
        "raises.py": "x = 1\nraise RuntimeError('no')",
        "exits.py": "raise SystemExit(0)",
        "large.txt": "1000000000000\n" * 8,
        "digits.txt": "9" * 6000,
        "card.md": "---\n- [a\n---\n",
    }.items():
        (folder / name).write_text(text)
    (folder / "binary.txt").write_bytes(bytes(range(128, 256)))
    (folder / "empty").mkdir()
    for number in range(4):
        write_image(folder / "labelled" / f"{number}.png", number)
    rows = [{"file_name": f"{number}.png", "label": 10**12 + number} for number in range(4)]
    (folder / "labelled" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*SAMPLE, "--model", ""), "--model: a value is required, but got ''"),
        ((*SAMPLE, "--model", "no/such/folder"), "no folder 'no/such/folder'. Ids on the Hub look like 'owner/name'"),
        ((*SAMPLE, "--model", "me/nothing"), "no folder 'me/nothing', and no pipeline with this id"),
        ((*SAMPLE, "--model", "nothing"), "There is no folder 'nothing'. Ids on the Hub look like 'owner/name'."),
        ((*SAMPLE, "--model", "shipped:adm-cifar"), "one of adm-cifar-32, .*, but got 'adm-cifar'"),
        ((*SAMPLE, "--model", "file"), "A saved model must be a folder .* but 'file' is a file"),
        ((*SAMPLE, "--model", "tiny", "--variant", "a/b"), "variant must consist of letters"),
        ((*SAMPLE, "--model", "tiny", "--revision", "x"), "--revision requires a pipeline on the Hub, but got x"),
        ((*SAMPLE, "--seed", -1), "--seed -1 must be at least 0"),
        ((*SAMPLE, "--batch_size", 0), "--batch_size 0 must be in"),
        ((*SAMPLE, "--batch_size", 10**12), "--batch_size 1000000000000 must be in"),
        ((*SAMPLE, "--num_samples", 10**15), "--num_samples 1000000000000000 must be in"),
        ((*SAMPLE, "--guidance_scale", "[1,2]"), r"--guidance_scale: '\[1,2\]' is not one number"),
        ((*SAMPLE, "--guidance_scale", "NaN"), "`guidance_scale` must be one finite number"),
        ((*SAMPLE, "--cfg_weight", "true"), "--cfg_weight: 'true' is not one number"),
        ((*SAMPLE, "--num_inference_steps", 2.5), "--num_inference_steps: '2.5' is not a whole number"),
        ((*SAMPLE, "--condition_unet", "no"), "--condition_unet: 'no' is not true or false"),
        ((*SAMPLE, "--timesteps", "5"), "--timesteps: '5' is not a list"),
        ((*SAMPLE, "--timestep_respacing", ""), "--timestep_respacing: a value is required"),
        ((*SAMPLE, "--guidance_options", "[1]"), "--guidance_options: .* is not an object in JSON"),
        ((*SAMPLE, "--labels", "large.txt"), r"--labels must be in \[0, 9\], but large.txt has \[1000000000000\]"),
        ((*SAMPLE, "--labels", "digits.txt"), "--labels digits.txt: "),
        (
            (*SAMPLE, "--labels", "binary.txt"),
            "--labels must be a text file or an .npz file, but binary.txt is neither",
        ),
        (
            (*SAMPLE, "--low_res", "drawn.npz"),
            "saved ClassifierGuidedPipeline, .* Leave out --low_res",
        ),
        ((*SAMPLE, "--model", default_cascade()[1]), "saved ADMUpsamplePipeline, .* Pass --low_res for an upsampler"),
        (
            (*SAMPLE, "--model", default_cascade()[1], "--low_res", "large.npz"),
            "--low_res large.npz must have images of .*16",
        ),
        (
            (*SAMPLE, "--model", default_cascade()[1], "--low_res", "empty"),
            "--low_res must be an .npz file, but there is no file empty",
        ),
        (("sample", "--output", "file", "--num_samples", 4), "must be a folder, but file is a file"),
        (("sample", "--output", "", "--num_samples", 4), "--output: a value is required"),
        *(
            (("evaluate", f"{name}.npz", *EVALUATE[2:]), message)
            for name, message in (
                ("nan", r"nan.npz has invalid statistics \(mu, sigma\): The mean must be finite"),
                ("infinite", r"infinite.npz has invalid statistics \(mu, sigma\): The covariance must be finite"),
                ("complex", "must be real numbers, but its data type is complex128"),
                ("asymmetric", "must be symmetric"),
                ("negative", "negative eigenvalue"),
                ("spatial", r"spatial.npz has invalid statistics \(mu_s, sigma_s\): The covariance must be finite"),
                ("huge", "Metrics must be finite, but got FD inf"),
                ("uncounted", "must be an integer, but got 'many'"),
            )
        ),
        ((*EVALUATE[:-1], "inception-v3-compat"), f"made with the feature extractor {DIGITS}, .* Pass .* {DIGITS}"),
        ((*EVALUATE, "--register", "syntax.py"), "--register syntax.py failed: SyntaxError"),
        ((*EVALUATE, "--register", "raises.py"), "--register raises.py failed in line 2: RuntimeError: no"),
        ((*EVALUATE, "--register", "exits.py"), "--register exits.py failed in line 1: SystemExit: 0"),
        ((*EVALUATE, "--register", "empty"), "--register must be a Python file, but there is no file empty"),
        ((*EVALUATE, "--output", "empty"), "The output must be a file, but empty is a folder"),
        ((*EVALUATE, "--output", "/dev/null"), "but /dev/null is a device"),
        ((*EVALUATE, "--output", "nowhere/x.json"), "x.json cannot be written, because there is no folder .*nowhere"),
        ((*EVALUATE, "--model_card", "card.md"), "The front matter of --model_card card.md cannot be read"),
        ((*EVALUATE, "--feature_extractor_weights", "empty"), "the weights of .* does not exist: empty"),
        (("evaluate", "", *EVALUATE[2:]), "argument REFERENCE: a value is required"),
        (("evaluate", "file", *EVALUATE[2:]), "must be an .npz file, a folder, .* but got the file file"),
        (("evaluate", "nothing", *EVALUATE[2:]), "no folder 'nothing', and no dataset with this id"),
        ((*MAKE, "--seed", -1), "--seed -1 must be at least 0"),
        ((*MAKE, "--num_neighbours", 3), "--num_neighbours 3 must be at least 4"),
        ((*NLL, "--num_images", 0), "--num_images 0 must be at least 1"),
        ((*NLL, "--variant", "a/b"), "variant must consist of letters"),
        (
            ("nll", "labelled", *NLL[2:], "--label_column", "label"),
            r"names or class numbers in \[0, .* holds \[1000000000000, ",
        ),
        (("nll", "labelled", *NLL[2:], "--image_column", "label"), "must be a column of images, but 'label' holds"),
        (
            ("nll", "labelled", *NLL[2:], "--dataset_revision", "x"),
            "--dataset_revision requires a dataset on the Hub, but got x",
        ),
        ((*NLL, "--split", "test"), "--split must be left out"),
        ((*NLL, "--resolution", 10**6), "--resolution 1000000 must be in"),
        ((*EVALUATE, "--samples_split", "test"), "--samples_split test requires a dataset"),
        ((*SWEEP, "--num_samples", 2), "--num_samples 2 must be in"),
        ((*SWEEP, "--num_sample", 2), "there is no option --num_sample: did you mean --num_samples?"),
        ((*SWEEP, "--num_samples", 4, "--num_inference_steps", 2, 5000), "num_inference_steps=5000"),
        (("demo", "--output", "new.png", "--seed", -1), "--seed -1 must be in"),
        (("demo", "--output", "new.png", "--photos", "--cascade"), "at most one of --photos and --cascade"),
        (("demo", "--output", "new.png", "--steps", 0), "--steps 0 must be at least 1"),
        (("convert", "--output", "new", "--unet", ""), "--unet: a value is required"),
        (("inspect-data", "--train_data_dir", "empty", "--seed", -1), "--seed -1 must be at least 0"),
        (("inspect-data", "--train_data_dir", "empty", "--dataloader_num_workers", -1), "--dataloader_num_workers -1"),
        (
            ("inspect-data", "--train_data_dir", "empty", "--dataset_config_name", "x"),
            "requires --dataset_name, but got x",
        ),
    ],
)
def test_a_mistake_ends_in_one_line(words, message, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = set(folder.rglob("*"))
    assert run(*words) == 2
    bars = ("Loading pipeline components", "Generating train split")  # of diffusers and datasets
    lines = [line for line in capfd.readouterr().err.splitlines() if line and not line.startswith(bars)]
    (line,) = lines
    assert re.search(f"^diffusers-adm {words[0]}: error: .*{message}", line), line
    assert len(line) < 1200
    assert set(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--verzion", "there is no option --verzion: did you mean --version?"),
        ("--versio", "there is no option --versio: did you mean --version?"),
        ("smple", "there is no command smple: did you mean sample?"),
        ("xyz", "there is no command xyz"),
    ],
)
def test_a_misspelt_first_word_is_told_the_nearest_one(word, message, capsys):
    assert run(word) == 2
    assert capsys.readouterr().err == f"diffusers-adm: error: {message} (see diffusers-adm --help)\n"


def test_commands_that_would_do_the_same_work_twice_refuse_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")  # a cluster may set it
    assert run("evaluate", "reference.npz", "samples.npz") == 2
    assert "samples.npz" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run("evaluate", "reference.npz", "samples.npz") == 2
    assert "evaluate runs in one process, but 2 were launched. Start it without" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"diffusers-adm {__version__}\n"
