"""Uploads of pipelines to the Hub."""

import tempfile

from huggingface_hub import CommitInfo, HfApi

from diffusers_adm.hub.saved_files import CODE_PATTERNS


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
    """Saves a pipeline and uploads it as one commit. The arguments are those of the pipeline's `push_to_hub`."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder, variant=variant)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            delete_patterns=CODE_PATTERNS,
        )
