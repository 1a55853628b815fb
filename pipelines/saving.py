"""Loading and saving of pipelines, from folders and the Hub."""

import os
from pathlib import Path
from typing import Self

import torch
from huggingface_hub import CommitInfo

from diffusers_adm.checks import check_dtype
from diffusers_adm.hub.bundle import write_code
from diffusers_adm.hub.cards import CLASS_NAMES, save_card
from diffusers_adm.hub.download import OtherPipelineError, as_installed, check_index, download
from diffusers_adm.hub.released_files import converted_folder
from diffusers_adm.hub.saved_files import SAVED_CLASSES, check_variant
from diffusers_adm.hub.upload import push
from diffusers_adm.models import NoisyClassifier
from diffusers_adm.openai.released import guiding_classifier, released_checkpoint
from diffusers_adm.saved_folders import check_safe_serialization, loading


def check_is_not_prefixed(name: str | os.PathLike) -> None:
    """Raises a ValueError if a pipeline is given as `released:NAME` or `shipped:NAME`, which only commands accept."""
    prefix, _, rest = str(name).partition(":")
    advice = {
        "released": f"Call from_released({rest!r}).",
        "shipped": "Pass default_model(), default_photo_model() or the like.",
    }
    if rest and prefix.lower() in advice:
        raise ValueError(f"Only commands accept names such as {str(name)!r}. {advice[prefix.lower()]}")


class SavingMixin:
    """Mixin that loads and saves a `DiffusionPipeline` together with the code of its classes."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """
        Loads a saved pipeline with the classes of this package. Code in the folder of the pipeline is not run.

        Args:
            pretrained_model_name_or_path: Folder, or id of a repository on the Hub.
            kwargs: Arguments of every pipeline of diffusers: `dtype`, `variant`, `revision`, `token`, components, ...

        Raises:
            ValueError: If the pipeline or a component has another class, the configs do not describe a pipeline, or `dtype` is not a
                floating-point type.
            OSError: If a file is missing or damaged.
        """
        kwargs.pop("trust_remote_code", None)  # ignored, because no code of the folder is run
        check_is_not_prefixed(pretrained_model_name_or_path)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        for one in dtype.values() if isinstance(dtype, dict) else [dtype]:
            check_dtype(one)
        folder = download(pretrained_model_name_or_path, kwargs)
        check_index(Path(folder), cls, kwargs)
        with loading(cls.__name__, folder):
            return super().from_pretrained(folder, **kwargs)

    @classmethod
    def from_released(
        cls,
        name: str,
        classifier: bool | str = True,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        accept_license: bool = False,
    ) -> Self:
        """
        Loads a released checkpoint. The first call downloads, checks and converts it. Later calls load it from the cache.

        Args:
            name: Short name, such as `"imagenet-256"`, or file name. `diffusers-adm released` lists all names.
            classifier: Whether to also load the classifier that guides the published samples, if there is one. The name of a
                released classifier loads that one instead.
            cache_dir: Folder of the cache. `None` means the folder `diffusers_adm` in the Hugging Face cache.
            local_files_only: Whether to use only files in the cache, without a download.
            dtype: Data type of the weights. `None` means float32, as in `from_pretrained`.
            accept_license: Whether the restrictions of the checkpoint's license are accepted. A few checkpoints require this before
                their download.

        Raises:
            ValueError: If no checkpoint has this name, another class loads it, it cannot be converted, its license is not accepted,
                the downloaded file is not this checkpoint, or `dtype` is not a floating-point type.
            OSError: If the checkpoint cannot be downloaded or written.
        """
        check_dtype(dtype)
        released = released_checkpoint(name)
        if released.kind == "classifier":
            raise ValueError(
                f"{released.name} is a classifier, which draws no images: choose the name of a UNet, and"
                f" pass classifier={released.name!r} to guide it."
            )
        own = next(base for base in cls.__mro__ if base.__name__ in SAVED_CLASSES)
        needed = CLASS_NAMES[released.kind]
        if own.__name__ != needed:
            raise OtherPipelineError(f"{released.name} is loaded by {needed}, not by {own.__name__}.")
        guiding = released_checkpoint(classifier) if isinstance(classifier, str) else guiding_classifier(released)
        if isinstance(classifier, str) and guiding.kind != "classifier":
            raise ValueError(f"`classifier` must be the name of a released classifier, but got {classifier!r}.")
        cache = {
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "accept_license": accept_license,
        }
        folder = converted_folder(released, own.from_openai, **cache)
        if guiding is None or not classifier:
            return cls.from_pretrained(folder, dtype=dtype)
        guiding_folder = converted_folder(guiding, NoisyClassifier.from_openai, **cache)
        network = NoisyClassifier.from_pretrained(guiding_folder, dtype=dtype)
        pipeline = cls.from_pretrained(folder, classifier=network, dtype=dtype)
        if classifier is True:
            pipeline._described_by_card = ("classifier",)  # the card of a released UNet names its classifier
        return pipeline

    @classmethod
    def load_config(cls, *args, **kwargs):
        """Loads the index of a saved pipeline. Its entries are changed to the installed classes of this package."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        as_installed(config, cls)
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs,
    ) -> None:
        """
        Saves the pipeline with the code of its classes. Users can then load it without this package:
        `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`. If the pipeline was loaded from a folder or repository with
        a card, the card is copied. Otherwise, a card is made from the config.

        Args:
            save_directory: Folder to write. If it has a card, the card is kept.
            safe_serialization: Must be `True`: weights are saved as safetensors.
            variant: Part of the names of the weight files, such as `"fp16"`.
            max_shard_size: Largest size of a weight file, such as `"5GB"`.
            push_to_hub: Whether to also upload the pipeline, always as safetensors of the default size.
            repo_id: Id of the repository. `None` means the name of the folder.
            kwargs: Other arguments of `push_to_hub`.

        Raises:
            TypeError: If arguments of `push_to_hub` are given, but `push_to_hub` is `False`.
            ValueError: If the variant cannot be part of a file name, or `safe_serialization` is `False`.
        """
        check_variant(variant)
        check_safe_serialization(safe_serialization)
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained takes {', '.join(kwargs)} only with push_to_hub=True.")
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size)
        write_code(self, Path(save_directory))
        save_card(self, save_directory)
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name, variant=variant, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        revision: str | None = None,
    ) -> CommitInfo:
        """
        Uploads the pipeline with its card (see `save_pretrained`) in one commit. The repository is created if it does not exist. The
        commit replaces earlier code of the classes, and earlier weights of the same variant. A card and all other files in the
        repository are kept.

        Args:
            repo_id: Id of the repository, such as `"me/my-model"`.
            commit_message: Message of the commit. `None` means `"Upload"` and the name of the class.
            private: Whether a new repository is private.
            token: Token of the account. `None` means the token of `hf auth login`.
            create_pr: Whether to open a pull request instead of committing.
            variant: Part of the names of the weight files, such as `"fp16"`.
            revision: Branch to commit to. It is created if it does not exist.

        Raises:
            HfHubHTTPError: If the Hub refuses the upload.
        """
        return push(
            self,
            repo_id,
            commit_message or f"Upload {type(self).__name__}",
            private,
            token,
            create_pr,
            variant,
            revision,
        )
