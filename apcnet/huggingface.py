"""Shares models on the Hugging Face Hub: uploads a model with a card of its run, and downloads one by its name.

A repository holds model.safetensors, README.md (the card), and for the model of a run config.json and preview.png.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from apcnet.config import Config
from apcnet.confusion import percent
from apcnet.files import printable, read_json, write_json
from apcnet.flags import train_command
from apcnet.models.segmentor import Segmentor, count_labels
from apcnet.training.folder import FINAL, read_config

PREFIX = "hf:"
TIMEOUT = 5.0  # seconds in which the Hub has to answer
MODEL, CARD, CONFIG, PREVIEW = "model.safetensors", "README.md", "config.json", "preview.png"
# Fields of a config that hold paths of the machine that trained, and words to stand for them.
PATHS = {
    "root": "DATA",
    "cache": None,
    "init": "MODEL",
    "backbone_weights": "WEIGHTS",
    "class_weights": "CLASS_WEIGHTS",
}
PUBLIC = ("timm", "tv:")  # weights that have names

CARD_TEXT = """\
# {title}

{sentence}

{preview}## Use

```sh
pip install 'apc_kernels[apcnet,hub]'
```

```python
import apcnet

model = apcnet.load("hf:{name}")
apcnet.predict(model, "photo.jpg").overlay().save("overlay.png")
```
"""


def download(name: str) -> Path:
    """Returns the local path of a model's file on the Hugging Face Hub, and downloads it at the first use.

    Args:
        name: "hf:user/model", or "hf:user/model@revision" for a branch, a tag or a commit.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if "/" not in repository:  # the Hub takes names of its own without a user, and would be asked
        raise ValueError(f"{name}: expected hf:user/model")
    client = _client()
    from huggingface_hub import errors, hf_hub_url

    cause: Exception | None = None
    try:
        try:  # once, for the client itself tries for half a minute
            url = hf_hub_url(repository, MODEL, revision=revision or None, endpoint=client.endpoint)
            client.get_hf_file_metadata(url=url, timeout=TIMEOUT)
        except errors.HfHubHTTPError:
            pass  # the Hub answers; the download tells the same, and reads an earlier one if the Hub is out of order
        except (OSError, *errors.HfHubHTTPError.__bases__) as error:
            cause = error
        offline = cause is not None
        return Path(client.hf_hub_download(repository, MODEL, revision=revision or None, local_files_only=offline))
    except errors.HFValidationError as error:
        raise ValueError(f"{name}: expected hf:user/model, {_reason(error)}") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{name}: there is no such repository, or it is private: type hf auth login to read private ones"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name}: expected a branch, tag or commit after the @, found no {revision}") from None
    except errors.RemoteEntryNotFoundError:
        raise ValueError(f"{name}: expected {MODEL} in it, as model.push_to_hub writes it, found none") from None
    except errors.LocalEntryNotFoundError as error:
        cause = cause or error
        offline = isinstance(cause, errors.OfflineModeIsEnabled)
        raise ValueError(
            f"{name}: {client.endpoint} cannot be reached ({'HF_HUB_OFFLINE is set' if offline else _reason(cause)}), "
            f"and there is no copy of an earlier download; {'unset it' if offline else 'try again with a network'}, "
            f"or name a model file of this machine"
        ) from error
    except (OSError, *errors.HfHubHTTPError.__bases__) as error:
        raise ValueError(f"{name}: the download failed: {_reason(error)}") from error


def push(
    model: Segmentor,
    name: str,
    *,
    run: str | Path | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Uploads a model and its card in one commit; the repository is created if it does not exist.

    Args:
        model, run: The model; and the folder of the run that trained it, whose data, scores, preview and config go onto
            the card, without the paths of this machine.
        name: "user/model".
        license: The name of a licence for the card, such as "apache-2.0".
        private: Make a new repository private.
        token: A token to write with; by default that of `hf auth login`, or of the environment variable HF_TOKEN.

    Returns:
        The URL of the repository.
    """
    if name.count("/") != 1:
        raise ValueError(f"name: expected user/model, got {name}")
    client = _client(token)
    from huggingface_hub import CommitOperationAdd, errors

    with TemporaryDirectory() as folder:
        _write(Path(folder), model, name, Path(run) if run is not None else None, license)
        try:
            url = client.create_repo(name, private=private, exist_ok=True)
            files = [CommitOperationAdd(path.name, path) for path in sorted(Path(folder).iterdir())]
            client.create_commit(name, files, commit_message="Upload model with apcnet")
        except errors.HFValidationError as error:
            raise ValueError(f"name: expected user/model, {_reason(error)}") from None
        except (OSError, *errors.HfHubHTTPError.__bases__) as error:  # of HTTP too, such as a host that is not found
            raise ValueError(
                f"{name}: the upload failed: {_reason(error)}; to write there, type hf auth login"
            ) from error
    return str(url)


def _client(token: str | None = None) -> Any:
    if find_spec("huggingface_hub") is None:
        raise ModuleNotFoundError("the Hugging Face Hub needs huggingface_hub: pip install 'apc_kernels[hub]'")
    from huggingface_hub import HfApi  # an extra

    return HfApi(token=token, library_name="apcnet")


def _reason(error: Exception) -> str:
    return printable(str(error).strip().partition("\n")[0], 500)


def _write(folder: Path, model: Segmentor, name: str, run: Path | None, license: str | None) -> None:
    """Writes the files of a repository to a folder."""
    model.save(folder / MODEL)
    config = None
    if run is not None:
        config = read_config(run)
        if (folder / MODEL).read_bytes() != (run / FINAL).read_bytes():
            raise ValueError(f"run: expected the run whose {FINAL} this model is, since the scores are that file's")
        write_json(folder / CONFIG, _without_paths(config.to_json()))
        if previews := sorted(run.glob("preview/*.png")):
            shutil.copyfile(previews[-1], folder / PREVIEW)
    scores = read_json(run / "metrics.json") if run is not None else None
    text = card(model, name, config, scores, license, (folder / PREVIEW).exists())
    (folder / CARD).write_text(text, encoding="utf-8")


def card(
    model: Segmentor,
    name: str,
    config: Config | None = None,
    scores: dict[str, Any] | None = None,
    license: str | None = None,
    preview: bool = False,
) -> str:
    """Returns the text of a model card: metadata for the Hub, how to use the model, scores, data and training.

    Args:
        model, name, license: As in `push`.
        config, scores: The config and the metrics.json of the run.
        preview: Show the picture preview.png.
    """
    about = model.architecture or {}
    kind, title = str(about.get("model", "model")), name.rpartition("/")[2]
    metadata: dict[str, Any] = {"license": license} if license else {}
    metadata |= {"library_name": "apcnet", "pipeline_tag": "image-segmentation"}
    metadata["tags"] = ["semantic-segmentation", kind, "pytorch"]
    sentence = f"{kind} with the backbone {about.get('backbone')} labels every pixel with one of {count_labels(model)} "
    parts = [
        CARD_TEXT.format(
            title=title,
            name=name,
            sentence=sentence + "classes.",
            preview=f"![Images, labels, predictions and errors]({PREVIEW})\n\n" if preview else "",
        )
    ]
    if config is not None and scores is not None:
        metadata["model-index"] = [_index(title, config, scores)]
        parts += [_scores(config, scores), _training(config)]
    elif model.classes:
        parts.append("## Classes\n\n" + ", ".join(map(_cell, model.classes)) + "\n")
    fields = (f"{field}: {json.dumps(value, ensure_ascii=False)}" for field, value in metadata.items())
    return "\n".join(["---", *fields, "---", "", *parts])  # JSON is YAML as well


def _index(title: str, config: Config, scores: dict[str, Any]) -> dict[str, Any]:
    """Returns the scores in the form that the Hub reads."""
    names = {"miou": ("mean_iou", "mIoU"), "macc": ("mean_accuracy", "mAcc"), "aacc": ("accuracy", "aAcc")}
    metrics = [{"type": kind, "name": label, "value": scores[key]} for key, (kind, label) in names.items()]
    data = {"name": config.data.dataset, "type": config.data.dataset, "split": config.data.val_split}
    task = {"type": "image-segmentation", "name": "Semantic segmentation"}
    return {"name": title, "results": [{"task": task, "dataset": data, "metrics": metrics}]}


def _scores(config: Config, scores: dict[str, Any]) -> str:
    test = {key: value for key, value in config.to_json()["evaluation"].items() if value not in (None, False, [1.0])}
    how = ", ".join(f"{key} {value}" for key, value in test.items()) or "a single scale"
    rows = [("all, mean", scores["miou"]), *scores["iou"].items()]
    return "\n".join(
        [
            "## Scores",
            "",
            f"{config.data.dataset}, split {config.data.val_split}, after {scores['step']:,} steps, {how}: mIoU "
            f"{percent(scores['miou'])}, mAcc {percent(scores['macc'])}, aAcc {percent(scores['aacc'])} per cent.",
            "",
            "| class | IoU |",
            "|---|---:|",
            *(f"| {_cell(name)} | {percent(iou)} |" for name, iou in rows),
            "",
        ]
    )


def _training(config: Config) -> str:
    public = Config.from_json(_without_paths(config.to_json()))
    words = " ".join(train_command(public, "runs/again"))
    return f"## Training\n\nThe file {CONFIG} holds every choice of the run. The command:\n\n```sh\n{words}\n```\n"


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Replaces the paths in a config, which tell about the machine of the run and serve nobody else."""
    public = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = _without_paths(value)
        elif key in PATHS and value is not None and not str(value).startswith(PUBLIC):
            value = PATHS[key]
        public[key] = value
    return public


def _cell(text: str) -> str:
    """Returns a class name as it can stand in a table of Markdown."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")
