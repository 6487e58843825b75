"""The model card of a run, ``README.md`` in its folder, with front matter for the Hugging Face Hub."""

import hashlib
import logging
from importlib import metadata
from pathlib import Path, PurePosixPath

import open_clip

from dive_fast.config.schema import ModelConfig, ReferenceConfig, TargetConfig
from dive_fast.identity import versions
from dive_fast.io.atomic_files import write_atomic
from dive_fast.model import prompt_file
from dive_fast.model.head import FILE as HEAD
from dive_fast.model.huggingface.hub_files import repository_of
from dive_fast.model.model_names import SCHEME
from dive_fast.training.run_report import Report
from dive_fast.training.setup import Run
from dive_fast.training.write_report import FIGURE

logger = logging.getLogger(__name__)

CARD = "README.md"
UNKNOWN = "unknown"
"""License of a model whose license the config does not name."""
SHOWN_CLASSES = 10
SHOWN_VERSIONS = ("dive_fast", "torch", "open_clip_torch", "deepspeed")
_MARK = "<!-- dive_fast model card "
"""Beginning of the last line, which has a digest of the card: an edited card is not replaced."""


def write_card(report: Report, run: Run) -> None:
    """Writes the model card into the run folder, unless the card there has been edited; rank 0 calls it."""
    path = run.folder / CARD
    if path.exists() and not _is_unedited(path):
        logger.warning("%s was edited and is kept; remove it to get a new model card", path)
        return
    text = card(report, run)
    write_atomic(path, f"{text}\n{_MARK}{_digest(text)} -->\n".encode())


def card(report: Report, run: Run) -> str:
    """The model card as text. It has no absolute path."""
    from huggingface_hub import ModelCardData  # takes a second to import

    model, has_prompts = run.config.model, (run.folder / prompt_file.FILE).is_file()
    front = ModelCardData(
        license=model.license or UNKNOWN,
        library_name="open_clip",
        pipeline_tag="zero-shot-image-classification",
        base_model=base_model(model),
        tags=["clip", "dive_fast"],
    )
    return "\n".join(
        [
            f"---\n{front.to_yaml()}\n---",
            f"# {report.run}",
            _summary(report, model, has_prompts),
            "## Results",
            _results(report, (run.folder / FIGURE).is_file()),
            "## Data",
            _data(run),
            "## Method",
            _method(report, run),
            "## Use",
            _use_prompts(model) if has_prompts else _use((run.folder / HEAD).is_file()),
            "## License",
            _license(model),
        ]
    )


def base_model(model: ModelConfig) -> str | None:
    """The pre-trained model's name on the Hugging Face Hub; None for local files and unknown names."""
    if model.name.startswith("hf-hub:"):
        return model.name.removeprefix("hf-hub:").partition("@")[0]
    if model.name.startswith(SCHEME):
        return repository_of(model.name)
    tag = model.pretrained
    known = {name.lower() for name in open_clip.list_pretrained_tags_by_model(model.name)} if tag else set()
    if tag is None or tag.lower() not in known:
        return None
    name = str((open_clip.get_pretrained_cfg(model.name, tag) or {}).get("hf_hub") or "").strip("/")
    return "/".join(name.split("/")[:2]) or None


def _summary(report: Report, model: ModelConfig, has_prompts: bool) -> str:
    if has_prompts:
        return (
            f"\nPrompts for {_shown_model(model)}, learned by {report.title} with dive_fast: `{prompt_file.FILE}` "
            "has the context of class prompts, for this model and others with the same text width and tokenizer.\n"
        )
    return (
        f"\n{_shown_model(model)}, fine-tuned by {report.title} with dive_fast. This folder is a model for "
        "[open_clip](https://github.com/mlfoundations/open_clip), with its preprocessing and tokenizer.\n"
    )


def _shown_model(model: ModelConfig) -> str:
    """The model's name and weights; of local files only the last part of the path."""
    scheme, separator, rest = model.name.partition(":")
    is_local = separator and scheme != "hf-hub" and (scheme != "hf" or repository_of(model.name) is None)
    name = f"{scheme}:{Path(rest).name}" if is_local else model.name
    if model.pretrained is None:
        return name
    return f"{name} ({Path(model.pretrained).name})"


def _results(report: Report, has_figure: bool) -> str:
    figure = f"\n![{report.message()}]({FIGURE})\n" if has_figure else ""
    if not report.rows:
        return f"\n{report.markdown()}"
    # The table's heading would be one of the card.
    weights, table = report.weights(), report.markdown().partition("\n\n")[2]
    return f"\n{weights[0].upper()}{weights[1:]}.\n\n{table}{figure}"


def _data(run: Run) -> str:
    target, reference = run.config.data.target, run.config.data.reference
    names = [name.replace("`", "'") for name in run.class_names]
    lines = [f"- target: `{_data_name(target)}`, {len(run.target.source):,} images"]
    if names:
        shown = ", ".join(f"`{name}`" for name in names[:SHOWN_CLASSES])
        lines[0] += f" of {len(names)} classes: {shown}{', ...' if len(names) > SHOWN_CLASSES else ''}"
    if reference is not None and run.reference is not None:
        pairs = "image-caption pairs, read as a stream of tars"
        if reference.order != "stream":
            held_out = len(run.held_out.samples)
            pairs = f"{len(run.reference.source):,} image-caption pairs, of which {held_out} were held out"
        lines.append(f"- reference: `{_data_name(reference)}`, {pairs}")
    return "\n" + "".join(f"{line}\n" for line in lines)


def _data_name(data: TargetConfig | ReferenceConfig) -> str:
    """The last part of a data set's path; for a pattern of files that of their folder."""
    path = PurePosixPath(data.path)
    is_pattern = any(character in path.name for character in "{*?[")
    return (path.parent.name if is_pattern else path.name) or path.name


def _method(report: Report, run: Run) -> str:
    train, data = run.config.train, run.config.data
    weight = "" if report.weight is None else f", weight of the reference loss {report.weight:g}"
    projection = "" if report.projection is None else f", `projection.name = {report.projection}`"
    batch = f"batch size {data.target.batch_size}"
    if run.reference is not None and data.reference is not None:
        batch += f" and {data.reference.batch_size} reference pairs"
    installed = {"dive_fast": metadata.version("dive_fast")} | versions()
    packages = ", ".join(f"{name} {installed[name]}" for name in SHOWN_VERSIONS if name in installed)
    names = f"`objective.name = {report.method}`{projection}"
    return (
        f"\n{report.title} ({names}{weight}), {run.total_steps} steps, {batch}, "
        f"learning rate {train.learning_rate:g}, weight decay {train.weight_decay:g}, {train.precision}, seed "
        f"{train.seed}. All settings are in `config.json`. Versions: {packages}.\n"
    )


def _use(has_head: bool) -> str:
    head = (
        "\n`head.safetensors` is a linear classifier of the target's classes on unit image features.\n"
        if has_head
        else ""
    )
    return f"""
```python
import open_clip
import torch
from PIL import Image

folder = "local-dir:path/to/this/folder"
model, preprocess = open_clip.create_model_from_pretrained(folder)
tokenizer = open_clip.get_tokenizer(folder)
names = ["a photo of a cat", "a photo of a dog"]
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("picture.jpg")).unsqueeze(0), normalize=True)
    text = model.encode_text(tokenizer(names), normalize=True)
print(names[(image @ text.T).argmax()])
```
{head}"""


def _use_prompts(model: ModelConfig) -> str:
    tag = "" if model.pretrained is None else f" --pretrained {Path(model.pretrained).name}"
    name = _shown_model(model.model_copy(update={"pretrained": None}))
    return f"""
```
dive-fast evaluate --model {name}{tag} --prompts {prompt_file.FILE} --datasets food101 --root /data
```

`--model` may name another model that the prompts fit.
"""


def _license(model: ModelConfig) -> str:
    if model.license is not None:
        return f"\n{model.license}\n"
    return (
        "\nUnknown: the license of the pre-trained weights applies. `model.license` in the config names another.\n"
    )


def _is_unedited(path: Path) -> bool:
    """Whether a card is as this module wrote it."""
    try:
        text, mark, rest = path.read_text(encoding="utf-8").rpartition(f"\n{_MARK}")
    except (OSError, UnicodeDecodeError):
        return False
    return bool(mark) and rest == f"{_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
