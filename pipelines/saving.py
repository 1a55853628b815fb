"""Loading and saving of pipelines, from folders and the Hub."""

import os
from pathlib import Path
from typing import Self

from huggingface_hub import CommitInfo

from diffusers_adm.hub.bundle import as_installed, download, push, write_code


class SavingMixin:
    """Loads and saves a `DiffusionPipeline` of this package together with the code of its classes."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """
        Loads a saved pipeline with the classes of this package; code that lies beside its weights is not run.

        Args:
            pretrained_model_name_or_path: Folder, or id of a repository on the Hub.
            kwargs: As for any pipeline of diffusers: `dtype`, `variant`, `revision`, `token`, components, ...

        Raises:
            ValueError: If the pipeline or a component is of another class.
        """
        kwargs.pop("trust_remote_code", None)  # of no use here: nothing remote is run
        folder = download(pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(folder, **kwargs)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """As for any pipeline; what the index says of this package's classes leads to the installed ones."""
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
        Saves the pipeline, and beside its weights the code of its classes, so that it loads without this package too:
        `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.

        Args:
            save_directory: Folder.
            safe_serialization: Whether weights go into safetensors.
            variant: Put into the names of the weight files, such as `"fp16"`.
            max_shard_size: Of a weight file, such as `"5GB"`.
            push_to_hub: Whether to upload it too, in safetensors of the default size, whatever the form of the folder.
            repo_id: Where to; the folder's name by default.
            kwargs: Other arguments of `push_to_hub`.

        Raises:
            TypeError: If there are such arguments without it.
        """
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained takes {', '.join(kwargs)} with push_to_hub=True alone.")
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size)
        write_code(self, Path(save_directory))
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
        Uploads the pipeline, and nothing else, as one commit. The repository is made if it does not exist; what else it
        holds, its card too, is left as it is.

        Args:
            repo_id: Such as `"me/my-model"`.
            commit_message: Of the commit; `"Upload"` and the class's name by default.
            private: Whether a new repository is.
            token: Of the account; that of `hf auth login` by default.
            create_pr: Whether to propose the commit instead of making it.
            variant: Put into the names of the weight files, such as `"fp16"`.
            revision: Branch to commit to; made if it does not exist.

        Raises:
            HfHubHTTPError: If the Hub refuses.
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
