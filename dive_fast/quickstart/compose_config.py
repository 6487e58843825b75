"""A commented config for a data set, and a summary of it, from what was seen and chosen."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from dive_fast.config.schema import TrainConfig
from dive_fast.quickstart.choose_model import ModelChoice
from dive_fast.quickstart.choose_settings import Settings, size_rule
from dive_fast.quickstart.class_files import ClassFiles
from dive_fast.quickstart.inspect_data import LabelledSet, Target
from dive_fast.quickstart.inspect_reference import Reference


@dataclass(frozen=True)
class Choices:
    """Everything that a config is written from."""

    target: Target
    num_train: int
    """Number of images that are trained on."""
    class_files: ClassFiles | None
    """None for a target without classes."""
    holdout: float | None
    template: str
    model: ModelChoice
    reference: Reference | None
    method: str
    method_train: TrainConfig
    """The ``train`` section of the config that the project ships for the method."""
    settings: Settings
    precision: str


class ConfigText(NamedTuple):
    """A config before it is formatted."""

    tree: dict[str, Any]
    comments: dict[str, str]


def compose(choices: Choices) -> ConfigText:
    """The config, with comments by dotted key."""
    settings, model = choices.settings, choices.model
    comments: dict[str, str] = {}
    tree: dict[str, Any] = {
        "model": {"name": model.name} | ({} if model.pretrained is None else {"pretrained": model.pretrained}),
        "data": {"target": _target(choices, comments)},
        "objective": _objective(choices, comments),
        "train": _train(choices, comments),
        "evaluate": _evaluate(choices, comments),
    }
    comments["model"] = (
        "The small model that the project ships, to try things out."
        if model.is_demo
        else "The pre-trained CLIP. Larger: ViT-L-14-quickgelu. Its weights are downloaded at the first use."
    )
    comments["data"] = "Paths are relative to the folder in which the command runs."
    if choices.reference is not None:
        reference = choices.reference
        tree["data"]["reference"] = {
            "format": reference.format,
            "path": reference.path,
            **reference.keys,
            "batch_size": settings.reference_batch_size,
            "workers": settings.workers,
        }
        comments["data.reference"] = "Image-caption pairs whose embeddings the tuned model must keep."
        comments["data.reference.batch_size"] = _reference_batch_comment(settings)
    return ConfigText(tree, comments)


def _data_section(data: LabelledSet) -> dict[str, Any]:
    return {"format": data.format, "path": data.path, **data.keys}


def _target(choices: Choices, comments: dict[str, str]) -> dict[str, Any]:
    settings, section = choices.settings, _data_section(choices.target.train)
    key = "data.target"
    if choices.class_files is not None:
        section |= {"class_names": choices.class_files.path_of["train"], "templates": choices.template}
        comments[f"{key}.class_names"] = (
            "One name a line, in the order of the sorted class folders. Edit it freely."
        )
        comments[f"{key}.templates"] = (
            "The prompt of an image; {} is its class name. imagenet: CLIP's 80 templates."
        )
    if choices.holdout is not None:
        section["holdout"] = choices.holdout
        comments[f"{key}.holdout"] = (
            "This share of each class is not trained on; evaluate.sets.val measures it. No file is moved."
        )
    section["batch_size"] = settings.batch_size
    comments[f"{key}.batch_size"] = (
        f"A power of two, over all GPUs: at most {size_rule(choices.num_train).max_batch_size}, and a quarter of "
        f"the {choices.num_train:,} images. Too large for the GPU? train.micro_batch_size changes no result."
    )
    section["workers"] = settings.workers
    comments[f"{key}.workers"] = "Processes that decode images, on each GPU, by the cores of this machine."
    return section


def _reference_batch_comment(settings: Settings) -> str:
    if settings.reference_batch_size == settings.batch_size:
        return "As many pairs as images, as in the paper."
    return (
        "Fewer pairs than images, which costs less time: with half as many, accuracy fell by 0.4 points and "
        "nothing more was forgotten (docs/study.md)."
    )


def _objective(choices: Choices, comments: dict[str, str]) -> dict[str, Any]:
    section: dict[str, Any] = {"name": choices.method}
    key = "objective.name"
    if choices.method == "dive":
        section["weight"] = choices.settings.weight
        comments[key] = "Learns the target while the embeddings of the reference keep their geometry."
        comments["objective.weight"] = "Lambda. Larger keeps more and learns more slowly" + (
            " (the demo's)."
            if choices.model.is_demo
            else " (1000: the paper). Too large where accuracy stays low."
        )
    elif choices.method == "tracer":
        comments[key] = (
            "Learns the target with a moving teacher; needs no reference pairs. dive keeps more, with "
            "data.reference. flyp is the plainest: dive-fast ensemble averages it with the pre-trained model."
        )
    elif choices.method == "flyp":
        comments[key] = (
            "Plain fine-tuning by the loss of pre-training. Afterwards dive-fast ensemble finds a mean of tuned "
            "and pre-trained weights that forgets less."
        )
    else:
        comments[key] = "docs/methods.md explains each method."
    return section


def _train(choices: Choices, comments: dict[str, str]) -> dict[str, Any]:
    settings = choices.settings
    comments["train.epochs"] = (
        f"{settings.total_steps:,} steps. By the number of images: {size_rule(choices.num_train).evidence}."
    )
    comments["train.learning_rate"] = (
        "The demo's; CLIP needs 1.0e-5."
        if choices.model.is_demo
        else "The papers' for ImageNet and most sets. Pictures unlike photos of the web may need 3.0e-5."
    )
    comments["train.warmup_steps"] = "A tenth of the steps, at most the paper's 500."
    comments["train.precision"] = {
        "fp32": "fp32 is the choice without a GPU and for small models; on a GPU, fp16 is faster.",
        "bf16": "The precision of this method's authors; fp16 on GPUs before Ampere.",
        "fp16": "fp16, not bf16: bf16 rounds away what the method compares (docs/precision.md).",
    }[choices.precision]
    return {
        "epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "weight_decay": choices.method_train.weight_decay,
        "warmup_steps": settings.warmup_steps,
        "precision": choices.precision,
    }


def _evaluate(choices: Choices, comments: dict[str, str]) -> dict[str, Any]:
    target, settings = choices.target, choices.settings
    sets: dict[str, Any] = {}
    if choices.holdout is not None:
        sets["val"] = _measured(target.train, choices, "val", {"holdout": choices.holdout})
        comments["evaluate.sets.val.holdout"] = "Equal to data.target.holdout: the images that are not trained on."
    elif target.val is not None:
        sets["val"] = _measured(target.val, choices, "val", {})
    if target.test is not None:
        sets["test"] = _measured(target.test, choices, "test", {})
        comments["evaluate.sets.test"] = "Measured at the end alone: a set that chooses weights is not a test."
    section: dict[str, Any] = {}
    comments["evaluate.workers"] = "Loader processes on each GPU."
    if not sets:
        comments["evaluate"] = (
            "There is nothing to measure: no classes, or one image of each. Add class folders: "
            "sets: {val: {format: folder, path: ..., class_names: ..., templates: ...}}"
        )
        return {"workers": settings.evaluate_workers}
    section["sets"] = sets
    first = next(iter(sets))
    comments[f"evaluate.sets.{first}.on_skipped"] = "Broken images are counted and left out instead of an error."
    if "val" in sets:
        section |= {"every_epochs": settings.every_epochs, "select": "val", "patience": settings.patience}
        if "test" in sets:
            section["during"] = ["val"]
        comments["evaluate.every_epochs"] = "Each evaluation writes a checkpoint."
        comments["evaluate.select"] = "The run ends with the weights of the best evaluation on this set."
        comments["evaluate.patience"] = "Evaluations without a better one after which training stops early."
    section["workers"] = settings.evaluate_workers
    return section


def _measured(data: LabelledSet, choices: Choices, name: str, keys: dict[str, Any]) -> dict[str, Any]:
    assert choices.class_files is not None
    path_of = choices.class_files.path_of
    names = {"class_names": path_of.get(name, path_of["train"]), "templates": choices.template}
    return _data_section(data) | names | keys | {"on_skipped": "report", "role": "id"}


def header(command: str, choices: Choices) -> tuple[str, ...]:
    """The lines of the comment at the top of the file."""
    return (
        f"Written by: {command}",
        f"{choices.num_train:,} images to train on in {choices.target.train.path}.",
        "Each number is a starting value, explained in docs/own_data.md; `dive-fast keys` lists all keys.",
    )
