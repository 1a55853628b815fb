"""Low-rank adapters of a model, as diffusers and peft implement them."""

import copy
import functools
import json
import os
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin

from diffusers_adm.saved_folders import check_safe_serialization, weight_files


class AdapterMixin(PeftAdapterMixin):
    """Mixin that adds low-rank adapters to a model of diffusers. It must come before `ModelMixin` among the base classes."""

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict, prefix: str | None = None, **kwargs) -> None:
        """
        Loads an adapter that a training run has saved. `fuse_lora` then merges it into the weights.

        Args:
            pretrained_model_name_or_path_or_dict: Folder of the adapter, id of a repository on the Hub, or state dict.
            prefix: Prefix of the names of the tensors.
            kwargs: Arguments of `PeftAdapterMixin.load_lora_adapter`.

        Raises:
            ValueError: If the adapter was trained for other classes, channels or widths. The model is left as it is.
        """
        from diffusers.loaders.lora_base import _fetch_state_dict

        # diffusers itself would change the layers first, and then fail to fill them.
        places = (
            "weight_name",
            "local_files_only",
            "cache_dir",
            "force_download",
            "proxies",
            "token",
            "revision",
            "subfolder",
        )
        adapter, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict,
            use_safetensors=kwargs.pop("use_safetensors", True),
            user_agent={"framework": "pytorch"},
            allow_pickle=False,
            metadata=kwargs.pop("metadata", None),
            **{place: kwargs.pop(place, None) for place in places},
        )
        check_adapter_fits(self, adapter, "" if prefix is None else f"{prefix}.")
        super().load_lora_adapter(adapter, prefix=prefix, metadata=metadata, **kwargs)

    # The signature of ModelMixin is kept, because pipelines pass on only arguments that the signature names.
    @functools.wraps(ModelMixin.save_pretrained, assigned=())
    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Saves the model with its adapters merged into the weights. The model itself does not change.

        Args:
            save_directory: Folder to write.
            kwargs: Arguments of `ModelMixin.save_pretrained`.

        Raises:
            ValueError: If `safe_serialization` is `False`.
        """
        check_safe_serialization(kwargs.get("safe_serialization", True))
        model = without_adapters(self)
        super(AdapterMixin, model).save_pretrained(save_directory, **kwargs)
        index = Path(save_directory, weight_files(kwargs.get("variant"))[-1])
        if index.is_file():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            if not all(index.with_name(shard).is_file() for shard in shards):
                index.unlink()  # it lists shards of an earlier save, which diffusers has removed


def without_adapters(model: torch.nn.Module) -> torch.nn.Module:
    """
    Returns a copy of a model with its adapters merged into its weights. Disabled adapters are left out. A model without adapters is
    returned itself.
    """
    if not getattr(model, "peft_config", None):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = copy.deepcopy(model)
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
        elif not layer.disable_adapters and not layer.merged:
            layer.merge()
    model.unload_lora()
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "modules_to_save"):  # peft keeps the trained copy of such a layer beside the frozen original
            trained = layer.modules_to_save[layer.active_adapters[0]]
            model.set_submodule(name, layer.original_module if layer.disable_adapters else trained)
    return model


def check_adapter_fits(model: torch.nn.Module, adapter: dict[str, torch.Tensor], prefix: str = "") -> None:
    """
    Compares the shapes of an adapter with those of a model.

    Args:
        model: Model that is to take the adapter. It may have others already.
        adapter: State dict of the adapter: low-rank factors, and the weights of layers that were trained whole.
        prefix: Prefix of the names of the tensors. Those without it are ignored.

    Raises:
        ValueError: If the adapter does not fit.
    """
    shapes = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    for name, tensor in adapter.items():
        name = name.removeprefix(prefix) if name.startswith(prefix) else ""
        layer, shape = name.replace(".lora_A", "").replace(".lora_B", ""), tuple(tensor.shape)
        if not layer.endswith((".weight", ".bias")) or "lora" in layer:
            continue
        expected = shapes.get(layer)
        if expected is not None and ".lora_A" in name:
            expected = (shape[0], *expected[1:])
        elif expected is not None and ".lora_B" in name:
            expected = (expected[0], *shape[1:])
        if expected != shape:
            known = "the model has no such layer" if expected is None else f"the model needs {expected}"
            raise ValueError(
                f"The adapter does not fit this {type(model).__name__}: {name} has the shape {shape}, but {known}. Load it into a"
                " model with the classes, channels and widths that it was trained with."
            )
