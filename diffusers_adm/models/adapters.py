"""Low-rank adapters of a model, as diffusers and peft implement them."""

import copy
import functools
import inspect
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from diffusers_adm.saved_folders import check_safe_serialization, loading, weight_files


# Arguments of `PeftAdapterMixin.load_lora_adapter` that say where an adapter is.
PLACE_OPTIONS = (
    "weight_name",
    "local_files_only",
    "cache_dir",
    "force_download",
    "proxies",
    "token",
    "revision",
    "subfolder",
)


class AdapterMixin(PeftAdapterMixin):
    """
    Mixin that adds low-rank adapters to a model of diffusers. It must come before `ModelMixin` among the base classes.

    An adapter has low-rank factors, and can have layers that were trained whole. The methods of diffusers change the low-rank factors
    only. These methods change the whole layers too: such a layer has the weights of the adapter while the adapter is active or fused,
    and otherwise those of the model.
    """

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        prefix: str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Loads an adapter that a training run has saved. It becomes the only active adapter. Disabled adapters stay disabled.

        Args:
            pretrained_model_name_or_path_or_dict: Folder of the adapter, id of a repository on the Hub, or state dict.
            prefix: Prefix of the names of the tensors.
            kwargs: Arguments of `PeftAdapterMixin.load_lora_adapter`.

        Raises:
            ValueError: If there is no such folder, there are no low-rank factors in it, or the adapter was trained for other classes,
                channels or widths. The model is left as it is.
        """
        options = {
            name: kwargs.pop(name) for name in ("use_safetensors", "metadata", *PLACE_OPTIONS) if name in kwargs
        }
        adapter, metadata = read_adapter(pretrained_model_name_or_path_or_dict, **options)
        # diffusers itself would change the layers first, and then fail to fill them.
        check_adapter_fits(self, adapter, "" if prefix is None else f"{prefix}.")
        super().load_lora_adapter(adapter, prefix=prefix, metadata=metadata, **kwargs)
        switch_whole_layers(self)

    def set_adapters(
        self,
        adapter_names: list[str] | str,
        weights: float | dict | list[float] | list[dict] | list[None] | None = None,
    ) -> None:
        """
        Activates adapters, and deactivates all others.

        Args:
            adapter_names: Names of the adapters. At most one of them can have layers that were trained whole.
            weights: Weight of the low-rank factors, one per adapter or one for all. `None` means 1. Whole layers have no weight.

        Raises:
            ValueError: If an adapter is unknown, or several have layers that were trained whole. The model is left as it is.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        known = list(getattr(self, "peft_config", {}))
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"`adapter_names` must be among the loaded adapters {known}, but got {unknown}.")
        check_whole_layers(self, names)
        super().set_adapters(adapter_names, weights)
        switch_whole_layers(self)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Activates adapters, and deactivates all others. Arguments and errors are those of `set_adapters`."""
        check_whole_layers(self, [adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name)
        switch_whole_layers(self)

    def disable_lora(self) -> None:
        """Disables all adapters, so that the model computes what it computed before they were loaded."""
        super().disable_lora()
        switch_whole_layers(self)

    def enable_lora(self) -> None:
        """Enables the active adapters again."""
        super().enable_lora()
        switch_whole_layers(self)

    def disable_adapters(self) -> None:
        """Disables all adapters, as `disable_lora` does."""
        super().disable_adapters()
        switch_whole_layers(self)

    def enable_adapters(self) -> None:
        """Enables the active adapters again, as `enable_lora` does."""
        super().enable_adapters()
        switch_whole_layers(self)

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """
        Merges adapters into the weights.

        Args:
            lora_scale: Factor of the low-rank factors. Whole layers are not scaled.
            safe_fusing: Whether to check that the merged weights are finite.
            adapter_names: Names of the adapters. `None` means the active ones. At most one fused adapter can have layers that were
                trained whole.

        Raises:
            ValueError: If several have layers that were trained whole. The model is left as it is.
        """
        names = names_in_layers(self, "active_adapters") if adapter_names is None else adapter_names
        check_whole_layers(self, [*names_in_layers(self, "merged_adapters"), *names])
        super().fuse_lora(lora_scale, safe_fusing, adapter_names)
        switch_whole_layers(self)

    def unfuse_lora(self) -> None:
        """Removes fused adapters from the weights. They stay loaded."""
        super().unfuse_lora()
        switch_whole_layers(self)

    def unload_lora(self) -> None:
        """Removes all adapters. The weights of fused adapters stay in the model, unless they are disabled."""
        for layer in low_rank_layers(self):
            if layer.disable_adapters and layer.merged:
                layer.unmerge()
        fused = names_in_layers(self, "merged_adapters")
        for name, layer in whole_layers(self).items():
            for adapter_name in fused:
                if adapter_name in layer.modules_to_save:
                    layer.original_module.load_state_dict(layer.modules_to_save[adapter_name].state_dict())
            self.set_submodule(name, layer.original_module)
        super().unload_lora()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """
        Removes adapters. If no active adapter is left, the first of the other adapters becomes active. Without others, the method does
        what `unload_lora` does.

        Args:
            adapter_names: Names of the adapters.

        Raises:
            ValueError: If an adapter is fused and others would be left. The model is left as it is.
        """
        deleted = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        left = [name for name in getattr(self, "peft_config", {}) if name not in deleted]
        if not left:
            self.unload_lora()
            return
        if fused := [name for name in names_in_layers(self, "merged_adapters") if name in deleted]:
            raise ValueError(
                "`adapter_names` must not contain fused adapters while others are loaded. Call `unfuse_lora` first, or `unload_lora`,"
                f" which keeps the fused weights and removes all adapters. Got {fused}."
            )
        active = names_in_layers(self, "active_adapters")
        if not set(active).isdisjoint(deleted):  # peft would choose another adapter in each layer, and warn
            self.set_adapter([name for name in active if name not in deleted] or left[:1])
        super().delete_adapters(adapter_names)
        for name, layer in whole_layers(self).items():
            others = [adapter_name for adapter_name in layer.modules_to_save if adapter_name not in deleted]
            for adapter_name in deleted:
                layer.delete_adapter(adapter_name, new_active_adapters=others[:1])
            if not others:
                self.set_submodule(name, layer.original_module)
        switch_whole_layers(self)

    # The signature of ModelMixin is kept, because pipelines pass on only arguments that the signature names.
    @functools.wraps(ModelMixin.save_pretrained, assigned=())
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        Saves the model with its adapters merged into the weights. The model itself does not change.

        Args:
            save_directory: Folder to write.
            args: Positional arguments of `ModelMixin.save_pretrained`.
            kwargs: Arguments of `ModelMixin.save_pretrained`.

        Raises:
            ValueError: If `safe_serialization` is `False`.
        """
        given = inspect.signature(ModelMixin.save_pretrained).bind(self, save_directory, *args, **kwargs).arguments
        check_safe_serialization(given.get("safe_serialization", True))
        model = without_adapters(self)
        super(AdapterMixin, model).save_pretrained(save_directory, *args, **kwargs)
        index = Path(save_directory, weight_files(given.get("variant"))[-1])
        if index.is_file():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            if not all(index.with_name(shard).is_file() for shard in shards):
                index.unlink()  # it lists shards of an earlier save, which diffusers has removed


def read_adapter(
    source: str | os.PathLike | dict[str, torch.Tensor],
    use_safetensors: bool = True,
    metadata: dict[str, Any] | None = None,
    **place: Any,
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """
    Reads an adapter from a folder, a file or the Hub.

    Args:
        source: Folder, file, id of a repository on the Hub, or state dict, which is returned itself.
        use_safetensors: Whether to read a safetensors file.
        metadata: Config of the adapter in a state dict.
        place: Options in `PLACE_OPTIONS`.

    Returns:
        State dict of the adapter, and its config if it is known.

    Raises:
        ValueError: If there is no such folder, or the file cannot be read.
    """
    from diffusers.loaders.lora_base import _fetch_state_dict

    if isinstance(source, dict):
        return source, metadata
    if not os.path.exists(source):
        try:
            validate_repo_id(os.fspath(source))
        except HFValidationError as error:
            raise ValueError(f"There is no folder {str(source)!r}. Ids on the Hub look like 'owner/name'.") from error
    with loading("The adapter", str(source)):
        return _fetch_state_dict(
            source,
            use_safetensors=use_safetensors,
            user_agent={"framework": "pytorch"},
            allow_pickle=False,
            metadata=metadata,
            **{**dict.fromkeys(PLACE_OPTIONS), **place},
        )


def low_rank_layers(model: torch.nn.Module) -> list[Any]:
    """Returns the layers of a model that have low-rank factors. They are `BaseTunerLayer`s of peft."""
    if "peft" not in sys.modules:  # models have no adapters then, and saving must not require peft
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


def whole_layers(model: torch.nn.Module) -> dict[str, Any]:
    """Returns the layers of a model that adapters train whole, by name. Each keeps the original and one copy per adapter."""
    if "peft" not in sys.modules:
        return {}
    from peft.utils import ModulesToSaveWrapper

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, ModulesToSaveWrapper)}


def names_in_layers(model: torch.nn.Module, kind: str) -> list[str]:
    """Returns the names of the adapters that are in an attribute of any layer: "active_adapters" or "merged_adapters"."""
    return list(dict.fromkeys(name for layer in low_rank_layers(model) for name in getattr(layer, kind)))


def check_whole_layers(model: torch.nn.Module, adapter_names: Iterable[str]) -> None:
    """Raises a ValueError if several adapters train the same layer whole, because such a layer has the weights of only one of them."""
    names = list(dict.fromkeys(adapter_names))
    for layer_name, layer in whole_layers(model).items():
        owners = [name for name in names if name in layer.modules_to_save]
        if len(owners) > 1:
            raise ValueError(
                "Only one adapter that trains whole layers can be active or fused. Other adapters beside it may have only low-rank"
                f" factors. Activate one adapter: {layer_name} was trained whole by {owners}."
            )


def switch_whole_layers(model: torch.nn.Module) -> None:
    """
    Gives whole layers the weights of the adapter that low-rank layers use. These are the fused adapters, or without fused ones, the
    active adapters. If adapters are disabled, whole layers have the weights of the model.
    """
    # Fused layers do not apply active adapters until they are unfused.
    used = names_in_layers(model, "merged_adapters") or names_in_layers(model, "active_adapters")
    disabled = any(layer.disable_adapters for layer in low_rank_layers(model))
    for layer in whole_layers(model).values():
        names = [name for name in used if name in layer.modules_to_save]
        # An unused layer is disabled but keeps an active adapter, because peft 0.18 cannot copy layers without one.
        active = names or list(layer.modules_to_save)[:1]
        if active != layer.active_adapters:
            layer.set_adapter(active)
        if layer.disable_adapters == bool(names and not disabled):
            layer.enable_adapters(layer.disable_adapters)
        # peft leaves an unused copy trainable when another adapter is added, and peft 0.18 the original when adapters are disabled.
        layer.original_module.requires_grad_(False)
        for name, trained in layer.modules_to_save.items():
            if name not in names:
                trained.requires_grad_(False)


def without_adapters(model: torch.nn.Module) -> torch.nn.Module:
    """
    Returns a copy of a model with its adapters merged into its weights. Disabled adapters are left out. A model without adapters is
    returned itself.
    """
    if not low_rank_layers(model) and not whole_layers(model):
        return model
    model = copy.deepcopy(model)
    for layer in low_rank_layers(model):
        if not layer.disable_adapters and not layer.merged:
            layer.merge()
    model.unload_lora()
    return model


def check_adapter_fits(model: torch.nn.Module, adapter: dict[str, torch.Tensor], prefix: str = "") -> None:
    """
    Checks that an adapter has low-rank factors, and that its shapes are those of a model.

    Args:
        model: Model that is to take the adapter. It may have others already.
        adapter: State dict of the adapter: low-rank factors, and the weights of layers that were trained whole.
        prefix: Prefix of the names of the tensors. Those without it are ignored.

    Raises:
        ValueError: If the adapter has no low-rank factors, or does not fit.
    """
    names = [name for name in adapter if name.startswith(prefix)]
    if not any("lora" in name or "lokr" in name for name in names):
        form = f"begin with {prefix!r} and contain 'lora'" if prefix else "contain 'lora'"
        raise ValueError(
            f"The adapter must have low-rank factors, whose names {form}, but got {list(adapter)[:3] or 'no tensors'}."
        )
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
