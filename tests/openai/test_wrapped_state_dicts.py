"""State dicts that other training loops have wrapped."""

import pytest
import torch
from golden_cases import draw_weights, load_case, published_flags

from diffusers_adm import ADMUNet2DModel, NoisyClassifier
from diffusers_adm.openai.files import read_state_dict


def with_prefix(tensors, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


WRAPPERS = {
    "DistributedDataParallel": lambda tensors: with_prefix(tensors, "module."),
    "torch.compile": lambda tensors: with_prefix(tensors, "_orig_mod."),
    "both": lambda tensors: with_prefix(tensors, "module._orig_mod."),
    "key": lambda tensors: {"state_dict": tensors, "step": 1000, "optimizer": {"state": {}, "param_groups": []}},
    "key and prefix": lambda tensors: {"model": with_prefix(tensors, "module."), "ema": {}},
    "average with a counter": lambda tensors: with_prefix(tensors, "module.") | {"n_averaged": torch.tensor(3)},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("case", ["unet_class_conditional", "classifier_spatial"])
def test_only_model_of_a_file_is_found(case, wrapper, tmp_path):
    tensors = draw_weights(load_case(case)[0])
    torch.save(WRAPPERS[wrapper](tensors), tmp_path / "wrapped.pt")
    found = read_state_dict(tmp_path / "wrapped.pt")
    assert list(found) == list(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_wrapped_state_dict_makes_a_model():
    description, _ = load_case("unet_class_conditional")
    tensors = draw_weights(description)
    unet = ADMUNet2DModel.from_openai({"state_dict": with_prefix(tensors, "module.")}, published_flags(description))
    assert torch.equal(unet.conv_out.weight, tensors["out.2.weight"])
    assert unet.conv_out.weight.data_ptr() != tensors["out.2.weight"].data_ptr()


def test_several_models_are_named():
    description, _ = load_case("classifier_adaptive")
    tensors, flags = draw_weights(description), published_flags(description)
    for content, places in (
        ({"model": tensors, "ema": tensors}, "holds 2 .key 'model'; key 'ema'."),
        (with_prefix(tensors, "model.") | with_prefix(tensors, "ema."), "holds 2 .prefix 'model.'; prefix 'ema.'."),
        ({"a": with_prefix(tensors, "b."), **tensors}, "holds 2 .no prefix; key 'a' prefix 'b.'."),
    ):
        with pytest.raises(ValueError, match=f"{places}. Pass the tensors of one"):
            NoisyClassifier.from_openai(content, flags)
