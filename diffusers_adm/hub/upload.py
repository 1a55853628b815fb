"""Uploads of pipelines to the Hub."""

import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from diffusers_adm.hub.cards import save_card
from diffusers_adm.hub.saved_files import CARD_FILE, CODE_PATTERNS, card_pictures
from diffusers_adm.saved_folders import weight_files


def replaced_files(folder: Path, variant: str | None = None) -> list[str]:
    """
    Returns patterns of the files in a repository that a saved folder replaces: code files, and weight files of one variant. If they
    stayed, diffusers would prefer shards of an earlier push to one new file.

    Args:
        folder: Folder of a saved pipeline or model.
        variant: Part of the weight files' names, such as `"fp16"`.
    """
    models = [
        config.parent.relative_to(folder) for config in (*folder.glob("config.json"), *folder.glob("*/config.json"))
    ]
    return [*CODE_PATTERNS, *((model / file).as_posix() for model in models for file in weight_files(variant))]


def push(
    pipeline,
    repo_id: str,
    commit_message: str,
    private: bool | None,
    token: str | None,
    create_pr: bool,
    variant: str | None,
    revision: str | None,
) -> CommitInfo:
    """Saves a pipeline and uploads it in one commit. The arguments are those of the pipeline's `push_to_hub`."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_card(pipeline, folder, repo_id)
        pipeline.save_pretrained(folder, variant=variant)
        has_card = api.file_exists(repo_id, CARD_FILE, revision=revision)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            ignore_patterns=[CARD_FILE, *card_pictures(Path(folder))] if has_card else None,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            delete_patterns=replaced_files(Path(folder), variant),
        )
