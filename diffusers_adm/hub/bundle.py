"""What a saved pipeline needs so that it loads from the Hub: its classes as single files, and an index that names them.

diffusers loads a pipeline's own classes from files of its folder, with `trust_remote_code=True`. A component's file may not
import its neighbours, so each holds all that its class needs. The files are made of this package's sources.
"""

import ast
import importlib.util
import inspect
import json
import os
import sys
import tempfile
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, HfApi, hf_hub_download, snapshot_download

from diffusers_adm.atomic_files import write_json
from diffusers_adm.hub.saved_files import CODE_PATTERNS, SAVED_CLASSES, add_code, add_file


PACKAGE = __package__.partition(".")[0]
# Methods that the files do without: they convert published checkpoints, load with this package's classes, or are there in
# diffusers' own form.
LEFT_OUT = {"from_openai", "to_openai_state_dict", "from_pretrained", "load_config", "push_to_hub"}
# A module that a file takes in the place of another: a class that came from a file saves that file again.
REPLACED = {f"{PACKAGE}.hub.bundle": f"{PACKAGE}.hub.saved_files"}


def write_code(pipeline, folder: Path) -> None:
    """
    Adds the code files to a folder that `save_pretrained` has just written, and names them in its index.

    Args:
        pipeline: What was saved.
        folder: Where.
    """
    add_code(pipeline, folder, single_file)


def save_model(model, folder: str | os.PathLike, **kwargs) -> None:
    """
    Saves a model by itself, with the code of its class, so that it loads without this package too:
    `AutoModel.from_pretrained(folder, trust_remote_code=True)`.

    Args:
        model: Of this package.
        folder: Where.
        kwargs: Of `save_pretrained`.
    """
    model.save_pretrained(folder, **kwargs)
    stem, name = add_file(type(model), Path(folder), single_file)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "auto_map": {"AutoModel": f"{stem}.{name}"}}, sort_keys=True)


def as_installed(config: dict, pipeline_class: type) -> None:
    """
    Rewrites a pipeline's index so that this package's own classes are loaded.

    Args:
        config: What `model_index.json` holds: names with a file of a folder, with a module of this package, or with
            neither.
        pipeline_class: The class that loads it.

    Raises:
        ValueError: If the index is of another pipeline.
    """
    name = config.get("_class_name")
    name = name[1] if isinstance(name, (list, tuple)) else name
    if name is not None:
        known = [base.__name__ for base in pipeline_class.__mro__ if issubclass(base, DiffusionPipeline)]
        if name not in known:
            raise ValueError(f"This is a saved {name}, not a {pipeline_class.__name__}.")
        config["_class_name"] = name
    models = importlib.import_module(f"{PACKAGE}.models")
    for component, entry in config.items():
        if isinstance(entry, (list, tuple)) and len(entry) == 2 and entry[1] in SAVED_CLASSES:
            config[component] = [getattr(models, entry[1]).__module__, entry[1]]


def download(name_or_path: str | os.PathLike, options: dict) -> str:
    """
    The folder of a pipeline: the path itself, or where the Hub's client keeps what it has downloaded of a repository.

    Args:
        name_or_path: Folder, or id of a repository.
        options: Of `from_pretrained`; those of the download are taken out.

    Raises:
        RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError: If there is no such pipeline on the Hub.
        LocalEntryNotFoundError: If it is not in the cache, and the Hub cannot be asked.
    """
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    download_options = {name: options.pop(name) for name in names if name in options}
    if os.path.isdir(name_or_path):
        return str(name_or_path)
    repo_id, variant = str(name_or_path), options.get("variant")
    index = Path(hf_hub_download(repo_id, "model_index.json", **download_options))
    # The commit that the index is of, lest a push in between mixes two.
    download_options["revision"] = index.parent.name
    entries = json.loads(index.read_text(encoding="utf-8"))
    # Components alone, and those that are not given: a repository may hold much else.
    components = [
        name
        for name, entry in entries.items()
        if isinstance(entry, list) and name != "_class_name" and entry[0] is not None and name not in options
    ]
    configs = [f"{name}/{file}" for name in components for file in ("config.json", "scheduler_config.json")]
    patterns = [f"{name}/{file}" for name in components for file in _weight_files(variant)]
    folder = Path(
        snapshot_download(repo_id, allow_patterns=["model_index.json", *configs, *patterns], **download_options)
    )
    if variant is not None:
        # What has no such variant loads its main weights, as in all pipelines.
        without = [name for name in components if not any(folder.glob(f"{name}/*.{variant}*"))]
        patterns = [f"{name}/{file}" for name in without for file in _weight_files(None)]
        snapshot_download(repo_id, allow_patterns=patterns, **download_options)
    return str(folder)


def _weight_files(variant: str | None) -> list[str]:
    """Patterns of the files that `save_pretrained` writes weights to, in one part or several."""
    stem, suffix = "diffusion_pytorch_model", "" if variant is None else f".{variant}"
    return [
        f"{stem}{suffix}.safetensors",
        f"{stem}{suffix}-*-of-*.safetensors",
        f"{stem}.safetensors.index{suffix}.json",
    ]


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
    """Saves a pipeline and uploads it as one commit; arguments as in the pipeline's `push_to_hub`."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline.save_pretrained(folder, variant=variant)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            delete_patterns=CODE_PATTERNS,
        )


def single_file(cls: type) -> str:
    """
    The source of one file that defines a class of this package and all that it needs of this package.

    Raises:
        ValueError: If the package's sources cannot be put into one file.
    """
    modules: dict[str, Module] = {}
    _collect(cls.__module__, modules)
    definitions = {}
    for module in modules.values():
        for name, node in module.definitions.items():
            if name in definitions:
                raise ValueError(f"Both {definitions[name][0].name} and {module.name} define {name}.")
            definitions[name] = (module, node)

    needed, names = [cls.__name__], {cls.__name__}
    imported: set[str] = set()
    components: set[str] = set()
    while needed:
        module, node = definitions[needed.pop()]
        for name in module.names_used(node):
            if name in SAVED_CLASSES and name != cls.__name__:
                components.add(name)
            elif name in definitions and name not in names:
                names.add(name)
                needed.append(name)
            elif name in module.imports:
                imported.add(module.imports[name])

    if components:
        imported.add("from diffusers import ModelMixin")
    parts = [
        f'"""{cls.__name__} of {PACKAGE}, with all that it needs, in one file.\n\nMade from the sources of that package by its'
        ' `save_pretrained`; Apache License 2.0.\n"""\n',
        "\n".join(sorted(imported, key=lambda line: (line.startswith("from"), line))) + "\n\n",
    ]
    if components:
        parts.append("# In annotations: the components' classes are in files of their own.")
        parts += [f"{name} = ModelMixin" for name in sorted(components)]
    for module in modules.values():
        chosen = [node for name, node in module.definitions.items() if name in names]
        parts += [f"\n{module.source(node)}\n" for node in dict.fromkeys(chosen)]
    return "\n".join(parts)


def _collect(name: str, modules: dict) -> None:
    """Reads a module after those of this package that it imports."""
    if name in modules:
        return
    module = Module(name)
    for needed in module.needs:
        _collect(needed, modules)
    modules[name] = module


class Module:
    """
    A module of this package, in parts.

    Args:
        name: Its full name.
    """

    def __init__(self, name: str):
        self.name = name
        loaded = sys.modules.get(name) or importlib.import_module(name)
        text = inspect.getsource(loaded)
        self.lines = text.splitlines()
        self.needs: list[str] = []
        self.imports: dict[str, str] = {}  # name -> the line that imports it
        self.definitions: dict[str, ast.stmt] = {}
        package = name if hasattr(loaded, "__path__") else name.rpartition(".")[0]
        for node in ast.parse(text).body:
            if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == PACKAGE):
                origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                if any(alias.asname for alias in node.names):
                    raise ValueError(f"{name} imports from {origin} under another name.")
                self.needs.append(REPLACED.get(origin, origin))
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    line = f"import {alias.name}"
                    if isinstance(node, ast.ImportFrom):
                        line = f"from {node.module} {line}"
                    if alias.asname:
                        line += f" as {alias.asname}"
                    self.imports[alias.asname or alias.name.split(".")[0]] = line
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.definitions[node.name] = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.definitions.update({target.id: node for target in targets})
            elif not isinstance(node, ast.Expr):  # a docstring
                raise ValueError(f"{name} does more than define and import: line {node.lineno}.")

    def _left_out(self, node: ast.stmt) -> list[ast.stmt]:
        if not isinstance(node, ast.ClassDef):
            return []
        return [member for member in node.body if isinstance(member, ast.FunctionDef) and member.name in LEFT_OUT]

    def names_used(self, node: ast.stmt) -> set[str]:
        """Names that a definition mentions, outside the methods that are left out."""
        without = {id(inner) for member in self._left_out(node) for inner in ast.walk(member)}
        return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and id(inner) not in without}

    def source(self, node: ast.stmt) -> str:
        """The lines of a definition, with the comments above it, without the methods that are left out."""
        kept = list(range(self._first_line(node), node.end_lineno + 1))
        for member in self._left_out(node):
            # With the empty line below it.
            gone = range(self._first_line(member), member.end_lineno + 2)
            kept = [line for line in kept if line not in gone]
        return "\n".join(self.lines[line - 1] for line in kept).rstrip()

    def _first_line(self, node: ast.stmt) -> int:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        while first > 1 and self.lines[first - 2].lstrip().startswith("#"):
            first -= 1
        return first
