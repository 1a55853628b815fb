"""Low-rank adapters of a model, as diffusers and peft implement them."""

import copy
import functools
import os

import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin


class AdapterMixin(PeftAdapterMixin):
    """Mixin that adds low-rank adapters to a model of diffusers. It must come before `ModelMixin` among the base classes."""

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict, prefix: str | None = None, **kwargs) -> None:
        """
        Loads an adapter that a training run has saved. `fuse_lora` then merges it into the weights.

        Args:
            pretrained_model_name_or_path_or_dict: Folder of the adapter, id of a repository on the Hub, or state dict.
            prefix: Prefix of the names of the tensors.
            kwargs: Arguments of `PeftAdapterMixin.load_lora_adapter`.
        """
        kwargs = {"use_safetensors": True, **kwargs}
        super().load_lora_adapter(pretrained_model_name_or_path_or_dict, prefix=prefix, **kwargs)

    # The signature of ModelMixin is kept, because pipelines pass on only arguments that the signature names.
    @functools.wraps(ModelMixin.save_pretrained, assigned=())
    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Saves the model with its adapters merged into the weights. The model itself does not change.

        Args:
            save_directory: Folder to write.
            kwargs: Arguments of `ModelMixin.save_pretrained`.
        """
        model = without_adapters(self) if getattr(self, "peft_config", None) else self
        super(AdapterMixin, model).save_pretrained(save_directory, **kwargs)


def without_adapters(model: torch.nn.Module) -> torch.nn.Module:
    """Returns a copy of a model with its adapters merged into its weights."""
    model = copy.deepcopy(model)
    model.fuse_lora()
    model.unload_lora()
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "modules_to_save"):  # peft keeps the trained copy of such a layer beside the frozen original
            model.set_submodule(name, layer.modules_to_save[layer.active_adapters[0]])
    return model
