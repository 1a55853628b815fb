"""Released checkpoints by name: the cache, wrong files, the license, and the commands."""

import dataclasses
import hashlib
import io
import json
import resource
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from command_line import run
from golden_cases import load_case, published_flags
from tiny_models import tiny_classifier, tiny_unet
from tiny_released import CLASSIFIER, UNET, add, check_refused, file_of, files_in, place_of

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.hub import released_files
from diffusers_adm.openai.released import RELEASED_BY_NAME
from diffusers_adm.openai.released_rows import TensorLayout
from diffusers_adm.pipelines.released import load_released
from diffusers_adm.training.pretrained import load_pretrained


# --- Loading ---


def test_pipeline_equals_its_files_and_comes_from_the_cache_the_second_time(server, tmp_path):
    for file, content in server.files.items():
        (tmp_path / file).write_bytes(content)
    flags = f"{RELEASED_BY_NAME['tiny'].flags} {RELEASED_BY_NAME['tiny-classifier'].flags}"
    direct = ClassifierGuidedPipeline.from_openai(tmp_path / "unet.pt", tmp_path / "classifier.pt", flags)
    first = ClassifierGuidedPipeline.from_released("tiny", cache_dir=tmp_path / "cache")
    assert len(server.ranges) == 2
    server.files.clear()
    second = ClassifierGuidedPipeline.from_released("Tiny", cache_dir=tmp_path / "cache", local_files_only=True)
    for pipeline in (first, second):
        assert pipeline.config.guidance_scale == 2.0
        assert not pipeline.unet.training
        for network in ("unet", "classifier"):
            expected = getattr(direct, network).state_dict()
            loaded = getattr(pipeline, network).state_dict()
            assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    (folder,) = (tmp_path / "cache" / "converted" / "tiny").iterdir()
    assert ClassifierGuidedPipeline.from_pretrained(folder).classifier is None


def test_classifier_is_left_out_and_weights_are_cast(server, tmp_path):
    pipeline = ClassifierGuidedPipeline.from_released("tiny", False, tmp_path, dtype=torch.bfloat16)
    assert pipeline.classifier is None
    assert pipeline.unet.dtype == torch.bfloat16
    assert len(server.ranges) == 1
    assert ClassifierGuidedPipeline.from_released("tiny", False, tmp_path).unet.dtype == torch.float32


def test_classifier_is_chosen_by_name(server, tmp_path):
    add("tiny-alone", server)
    assert ClassifierGuidedPipeline.from_released("tiny-alone", cache_dir=tmp_path).classifier is None
    guided = ClassifierGuidedPipeline.from_released("tiny-alone", classifier="Tiny_classifier", cache_dir=tmp_path)
    expected = ClassifierGuidedPipeline.from_released("tiny", cache_dir=tmp_path).classifier.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in guided.classifier.state_dict().items())
    with pytest.raises(ValueError, match="`classifier` must be the name of a released classifier, but got 'tiny'"):
        ClassifierGuidedPipeline.from_released("tiny-alone", classifier="tiny", cache_dir=tmp_path)


def test_cache_is_below_that_of_hugging_face(server, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    ClassifierGuidedPipeline.from_released("tiny", classifier=False)
    assert place_of(tmp_path / "diffusers_adm").read_bytes() == UNET


@pytest.mark.parametrize("load", [ClassifierGuidedPipeline.from_released, load_released])
def test_dtype_that_is_none_is_refused_before_the_download(load, server, tmp_path):
    for dtype in ("float16", torch.int8):
        with pytest.raises(ValueError, match="`dtype` must be a floating-point type, such as torch.float16, but got "):
            load("tiny", cache_dir=tmp_path, dtype=dtype)
    assert not server.ranges


def test_upsampler_is_loaded_by_its_own_class(server, tmp_path):
    server.files["up.pt"] = file_of("upsampler")
    flags = f"{published_flags(load_case('upsampler')[0])} --small_size 8"
    add("tiny-up", server, "upsampler", "up.pt", "upsampler", flags=flags)
    with pytest.raises(ValueError, match="tiny-up is loaded by ADMUpsamplePipeline"):
        ClassifierGuidedPipeline.from_released("tiny-up", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="tiny-classifier is a classifier, which draws no images"):
        ClassifierGuidedPipeline.from_released("tiny-classifier", cache_dir=tmp_path)
    assert ADMUpsamplePipeline.from_released("tiny-up", cache_dir=tmp_path).unet.config.low_res_conditioning


def test_subclass_is_loaded_from_the_folder_of_its_base(server, tmp_path):
    class Own(ClassifierGuidedPipeline):
        pass

    assert type(Own.from_released("tiny", cache_dir=tmp_path)) is Own
    assert type(ClassifierGuidedPipeline.from_released("tiny", cache_dir=tmp_path)) is ClassifierGuidedPipeline


def test_mirror_takes_the_place_of_the_address(server, tmp_path, monkeypatch):
    add("far", server, address="http://far.invalid/unet.pt", file="unet.pt")
    monkeypatch.setenv(released_files.MIRROR_VARIABLE, f"{server.url}/")
    ClassifierGuidedPipeline.from_released("far", classifier=False, cache_dir=tmp_path)


# --- The folder of the conversion ---


def converted(cache: Path, name: str = "tiny") -> Path:
    convert = ClassifierGuidedPipeline.from_openai
    return released_files.converted_folder(RELEASED_BY_NAME[name], convert, cache, local_files_only=True)


@pytest.fixture
def warm(server, tmp_path) -> Path:
    """A cache that has the file of `tiny`."""
    place_of(tmp_path).write_bytes(UNET)
    return tmp_path


def test_folder_and_its_card_record_the_hash_of_the_file(warm):
    folder, sha256 = converted(warm), hashlib.sha256(UNET).hexdigest()
    assert json.loads((folder / "conversion.json").read_text())["sha256"] == sha256
    assert sha256 in (folder / "README.md").read_text()


def test_damaged_folder_is_converted_again(warm):
    folder = converted(warm)
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    for damage in (
        lambda: weights.write_bytes(whole[weights][:-1]),
        lambda: (folder / "unet" / "config.json").write_text(" " * len(whole[folder / "unet" / "config.json"])),
        lambda: (folder / "model_index.json").unlink(),
        lambda: (folder / "conversion.json").write_text("{"),
    ):
        damage()
        assert converted(warm) == folder
        assert {path: path.read_bytes() for path in whole} == whole


def test_folder_is_converted_again_only_if_its_contents_change(warm):
    folder = converted(warm)
    before = folder.stat().st_mtime_ns
    RELEASED_BY_NAME["tiny"] = dataclasses.replace(
        RELEASED_BY_NAME["tiny"], note="new", license="new", aliases=("new",)
    )
    assert converted(warm) == folder
    assert folder.stat().st_mtime_ns == before
    RELEASED_BY_NAME["tiny"] = dataclasses.replace(RELEASED_BY_NAME["tiny"], guidance_scale=3.0)
    changed = converted(warm)
    assert ClassifierGuidedPipeline.from_pretrained(changed).config.guidance_scale == 3.0
    assert list(folder.parent.iterdir()) == [changed]


def test_another_address_is_another_checkpoint(server, tmp_path):
    """Tests two processes that register different checkpoints with the same name."""
    tensors = torch.load(io.BytesIO(UNET))
    tensors["out.2.bias"] += 1
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    server.files["other.pt"] = buffer.getvalue()
    first = ClassifierGuidedPipeline.from_released("tiny", False, tmp_path).unet
    shutil.rmtree(tmp_path / "converted")
    RELEASED_BY_NAME["tiny"] = dataclasses.replace(RELEASED_BY_NAME["tiny"], address=f"{server.url}/other.pt")
    second = ClassifierGuidedPipeline.from_released("tiny", False, tmp_path).unet
    torch.testing.assert_close(second.conv_out.bias, first.conv_out.bias + 1)


def test_own_file_with_the_name_of_a_released_one_is_not_given_its_flags(tmp_path):
    (tmp_path / "lsun_cat.pt").write_bytes(UNET)
    flags = published_flags(load_case("unet_class_conditional")[0])
    for given in (flags, None):
        with pytest.raises(
            ValueError, match="lsun_cat.pt' is not lsun-cat, which has 552,814,086 parameters: it holds"
        ):
            ClassifierGuidedPipeline.from_openai(tmp_path / "lsun_cat.pt", flags=given)


def test_cache_that_has_it_is_only_read(warm):
    converted(warm)
    times = {path: path.stat().st_mtime_ns for path in warm.rglob("*")}
    for path in times:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        converted(warm)
        assert {path: path.stat().st_mtime_ns for path in warm.rglob("*")} == times
    finally:
        for path in times:
            path.chmod(0o755)


def test_cache_that_cannot_be_written_is_named(server):
    with pytest.raises(OSError) as caught:
        ClassifierGuidedPipeline.from_released("tiny", cache_dir="/proc/cache")
    assert str(caught.value.filename).startswith("/proc/cache")
    assert not server.ranges


# --- Files that are others ---


def test_truncated_file_of_unknown_length_is_refused(server, tmp_path):
    server.says_length = False
    server.files["unet.pt"] = UNET[: len(UNET) // 2]
    check_refused("unet.pt must be a checkpoint of tensors by name, but is damaged or incomplete", tmp_path)
    server.files["unet.pt"] = UNET
    ClassifierGuidedPipeline.from_released("tiny", classifier=False, cache_dir=tmp_path)


def test_file_with_flipped_bytes_is_refused(server, tmp_path):
    data, middle = bytearray(UNET), len(UNET) // 2
    data[middle : middle + 64] = bytes(byte ^ 0x5A for byte in data[middle : middle + 64])
    server.files["unet.pt"] = bytes(data)
    check_refused("unet.pt must be a checkpoint of tensors by name, but is damaged", tmp_path)


def test_file_of_another_kind_is_refused(server, tmp_path):
    server.files["unet.pt"] = CLASSIFIER
    check_refused("is not tiny, which has .* parameters: it holds the tensors of tiny-classifier", tmp_path)
    server.files["unet.pt"] = file_of("unet_unconditional_plain")
    check_refused("is not tiny, which has .* parameters: it holds .* parameters of other tensors", tmp_path)


def test_file_with_code_is_not_run(server, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    server.files["unet.pt"] = file_of("unet_class_conditional", trap=Trap())
    check_refused("damaged or incomplete, or holds code", tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_other_hash_is_refused(server, tmp_path):
    add("hashed", server, sha256=hashlib.sha256(UNET).hexdigest())
    ClassifierGuidedPipeline.from_released("hashed", cache_dir=tmp_path / "right")
    server.files["unet.pt"] = file_of("unet_class_conditional", **{"out.2.bias": torch.zeros(6)})
    check_refused("is not hashed: its SHA-256 is", tmp_path / "wrong", "hashed")


def test_file_that_a_user_has_put_there_is_checked_and_kept(server, tmp_path):
    file = place_of(tmp_path)
    file.write_bytes(CLASSIFIER)
    with pytest.raises(ValueError, match=f"{file} is not tiny"):
        ClassifierGuidedPipeline.from_released("tiny", cache_dir=tmp_path)
    assert files_in(tmp_path) == {str(file.relative_to(tmp_path))}
    file.write_bytes(UNET)
    ClassifierGuidedPipeline.from_released("tiny", False, cache_dir=tmp_path, local_files_only=True)
    assert not server.ranges


# --- What is refused before a download ---


def test_nothing_is_downloaded_offline(server, tmp_path, monkeypatch):
    check_refused("tiny is not in the cache .* local_files_only", tmp_path, error=OSError, local_files_only=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    check_refused("tiny is not in the cache .* HF_HUB_OFFLINE", tmp_path, error=OSError)
    assert not server.ranges


def test_license_that_needs_it_is_accepted_once(server, tmp_path):
    add("bound", server, license="CC BY-NC-SA 4.0", terms="non-commercial")
    message = "The license of bound, CC BY-NC-SA 4.0, allows non-commercial use only .* pass accept_license=True"
    check_refused(message, tmp_path, "bound")
    assert not server.ranges
    ClassifierGuidedPipeline.from_released("bound", cache_dir=tmp_path, accept_license=True)
    ClassifierGuidedPipeline.from_released("bound", cache_dir=tmp_path).save_pretrained(tmp_path / "saved")
    assert "License: CC BY-NC-SA 4.0, for non-commercial use." in (tmp_path / "saved" / "README.md").read_text()


def test_disk_without_room_is_named_before_the_download(server, tmp_path):
    add("huge", server, layout=TensorLayout("", 10**15))
    check_refused(
        "The file of huge and its conversion require 8000000.0 GB in .*, but only .* GB are free",
        tmp_path,
        "huge",
        OSError,
    )
    assert not server.ranges


def test_checkpoint_that_cannot_be_converted_says_why(tmp_path):
    check_refused("openimages-512 cannot be converted, because it predicts v", tmp_path, "openimages-512")


# --- Commands ---


@pytest.fixture
def cache(server, tmp_path, monkeypatch) -> Path:
    """The cache of the commands."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hub"))
    return tmp_path / "hub" / "diffusers_adm"


def test_convert_writes_a_released_checkpoint_with_its_classifier_and_its_card(cache, server, tmp_path, capsys):
    assert run("convert", "--released", "tiny", "--output", tmp_path / "out") == 0
    pipeline = ClassifierGuidedPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.classifier is not None
    assert "# tiny" in (tmp_path / "out" / "README.md").read_text()
    words = ("convert", "--released", "tiny-classifier", "--dtype", "float16", "--output", tmp_path / "classifier")
    assert run(*words) == 0
    card = (tmp_path / "classifier" / "README.md").read_text()
    assert "# tiny-classifier" in card and "weights in float16 or bfloat16 are rounded" in card
    assert hashlib.sha256(CLASSIFIER).hexdigest() in card
    network = NoisyClassifier.from_pretrained(tmp_path / "classifier", dtype=torch.float16)
    expected = pipeline.classifier.half().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
    assert len(server.ranges) == 2


def test_commands_say_in_one_line_what_is_wrong(cache, server, tmp_path, capsys):
    add("bound", server, license="CC BY-NC-SA 4.0", terms="non-commercial")
    output = ("--output", tmp_path / "out")
    for words, message in (
        (("convert", "--released", "tinny", *output), "No released checkpoint is called 'tinny'. Similar names: tiny"),
        (
            ("convert", "--released", "bound", *output),
            "The license of bound, CC BY-NC-SA 4.0, allows non-commercial use only",
        ),
        (("convert", "--released", "tiny", "--unet", "a.pt", *output), "leave out --unet"),
        (("sample", "--model", "released:bound", *output), "To accept the license, pass accept_license=True"),
        (("sample", "--model", "released:tiny-classifier", *output), "draws no images: choose the name of a UNet"),
        (
            ("sample", "--model", "released:tiny", "--variant", "fp16", *output),
            "--revision and --variant require a saved",
        ),
    ):
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not files_in(cache)
    assert run("convert", "--released", "bound", "--accept_license", *output) == 0


@pytest.mark.filterwarnings("ignore:The UNet has 1000 classes and the classifier has 30")
def test_samples_are_drawn_with_a_released_checkpoint(cache, server, tmp_path, capsys):
    words = ("--num_samples", 2, "--num_inference_steps", 2, "--batch_size", 2, "--output", tmp_path / "samples")
    assert run("sample", "--model", "Released:Tiny", *words) == 0
    assert (tmp_path / "samples" / "samples_2x32x32x3.npz").is_file()


def test_training_starts_from_a_released_checkpoint(cache, server):
    for name, networks in (("tiny", "unet"), ("tiny-classifier", "classifier")):
        released = getattr(ClassifierGuidedPipeline.from_released("tiny"), networks)
        model = type(released).from_config(released.config)
        load_pretrained(model, f"released:{name}", None)
        expected = released.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def test_training_refuses_other_checkpoints_before_their_download(cache, server):
    add("bound", server, license="CC BY-NC-SA 4.0", terms="non-commercial")
    unet, classifier = tiny_unet(), tiny_classifier()
    for model, name, message, options in (
        (unet, "tiny-classifier", "tiny-classifier has the kind classifier, but needed is: unet", {}),
        (classifier, "tiny", "tiny has the kind unet, but needed is: classifier", {}),
        (tiny_unet(low_res_conditioning=True), "tiny", "tiny has the kind unet, but needed is: upsampler", {}),
        (unet, "tiny", "--pretrained_subfolder requires a folder or Hub id", {"subfolder": "unet"}),
        (unet, "bound", "The license of bound, CC BY-NC-SA 4.0, allows non-commercial use only", {}),
    ):
        with pytest.raises(ValueError, match=message):
            load_pretrained(model, f"released:{name}", **options)
    assert not server.ranges


@pytest.mark.parametrize("downloaded", [False, True])
def test_disk_that_is_full_leaves_nothing_and_is_named(downloaded, cache, server, tmp_path, capsys):
    if downloaded:
        place_of(cache).write_bytes(UNET)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(UNET) // 2, unlimited[1]))
    try:
        assert run("convert", "--released", "tiny", "--output", tmp_path / "out") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert ("converted/tiny/" if downloaded else "/tiny.pt: File too large") in error
    assert not (tmp_path / "out").exists()
    assert files_in(cache) == ({str(place_of(cache).relative_to(cache))} if downloaded else set())


def test_listing_has_a_row_for_each_checkpoint_and_fits_a_terminal(capsys):
    assert run("released") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = {line.split()[0]: place for place, line in enumerate(lines) if not line.startswith(" ")}
    assert list(rows) == ["name", *RELEASED_BY_NAME]
    for name, columns, remark in (
        ("name", "name model pixels classes GB license", "what it is"),
        ("imagenet-256", "unet 256 1000 2.2 MIT (code), research only", "ImageNet; guided by imagenet-256-classifier"),
        ("imagenet-256-classifier", "classifier 256 1000 0.2 MIT (code), research only", "trained on ImageNet"),
        ("repaint-places", "unet 256 none 2.2 CC BY-NC-SA 4.0, non-commercial", "Places2; for inpainting"),
        ("edm-imagenet-64", "unet 64 1000 1.2 MIT (code), research only", "diffusion model of Karras et al. 2022"),
        ("openimages-512", "unet 512 none 2.2 not stated", "trained on OpenImages; cannot be converted, because"),
    ):
        assert " ".join(lines[rows[name]].split()).endswith(columns)
        assert remark in lines[rows[name] + 1]
