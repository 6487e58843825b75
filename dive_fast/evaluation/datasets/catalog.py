"""Catalog of the data sets known by name, and of the suites that the paper's tables report."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from dive_fast.config.schema import Metric
from dive_fast.data.classes import (
    are_numbers,
    are_wordnet_ids,
    check_labels,
    join_names,
    remark_on_repeated,
    remarks,
)
from dive_fast.data.sources.source import locate
from dive_fast.errors import ConfigError, DataError, nearest
from dive_fast.evaluation.datasets import layouts
from dive_fast.evaluation.datasets.class_names import class_names_of, templates_of
from dive_fast.evaluation.datasets.evaluation_set import Captioned, Labelled
from dive_fast.evaluation.datasets.openers import (
    open_caltech,
    open_caption_set,
    open_eurosat,
    open_first_layout,
    open_fmow_split,
    open_imagenet_v2,
    open_iwildcam_split,
    open_objectnet,
    open_wordnet_folders,
)

Role = Literal["id", "ood", "zero_shot"]


@dataclass(frozen=True)
class KnownDataset:
    """A data set known by name: its layouts, metric, templates and number of classes."""

    title: str
    """Header of its column in tables."""
    open: Callable[[Path], Labelled | Captioned | None]
    """Opens a folder; None if the data set is not there. The set may have no templates."""
    layout: str
    """Description of the accepted folder layouts, for messages."""
    role: Role | None = None
    metric: Metric = "top1"
    aliases: tuple[str, ...] = ()
    """Alternative names of its folder."""
    templates: str = "imagenet1k"
    classes: tuple[int, ...] = ()
    """Valid numbers of classes; layouts of one data set may differ."""


def _wilds_set(
    title: str, open_split: Callable[..., Labelled | None], split: str, role: Role | None, metric: Metric
) -> KnownDataset:
    if open_split is open_iwildcam_split:
        name, folder, tables, classes = "iwildcam", "iwildcam_v2.0", "metadata.csv, categories.csv, train/", 182
    else:
        name, folder, classes = "fmow", "fmow_v1.1", 62
        tables = "rgb_metadata.csv, country_code_mapping.csv, images/"
    return KnownDataset(
        title,
        partial(open_split, split=split),
        f"{folder} in WILDS' layout ({tables})",
        role,
        metric,
        (name, folder, "wilds"),
        name,
        (classes,),
    )


def _zero_shot(
    title: str,
    layout: str,
    aliases: tuple[str, ...],
    templates: str,
    openers: dict[str, layouts.Layout],
    classes: tuple[int, ...],
) -> KnownDataset:
    layout = f"CLIP-benchmark's tars (test/*.tar, classnames.txt), {layout}, or one folder per class in test"
    opener = partial(open_first_layout, openers=openers)
    return KnownDataset(title, opener, layout, "zero_shot", "top1", aliases, templates, classes)


def _layouts(
    coop: tuple[str, tuple[str, ...]] | None, specific: dict[str, layouts.Layout], names: str | None = None
) -> dict[str, layouts.Layout]:
    """Layouts in the order in which they are tried: CoOp's split, the data set's specific ones, class folders."""
    openers: dict[str, layouts.Layout] = {}
    if coop is not None:
        openers["coop"] = partial(layouts.coop, split=f"split_zhou_{coop[0]}.json", images=coop[1])
    return openers | specific | {"folders": partial(layouts.class_folders, names=names)}


_torchvision = partial(partial, layouts.torchvision)
_TARS_OR = "CLIP-benchmark's tars (test/*.tar, classnames.txt) or "
KNOWN: dict[str, KnownDataset] = {
    "imagenet1k": KnownDataset(
        "ImageNet",
        partial(open_wordnet_folders, subset="", inside=("val",)),
        f"{_TARS_OR}val/<WordNet id>/",
        "id",
        aliases=("imagenet", "imagenet-1k", "ILSVRC2012"),
        classes=(1000,),
    ),
    "imagenetv2": KnownDataset(
        "ImageNet-V2",
        open_imagenet_v2,
        f"{_TARS_OR}ImageNetV2-matched-frequency/<0 to 999>/",
        "ood",
        aliases=("imagenet-v2", "ImageNetV2", "imagenetv2-matched-frequency-format-val"),
        classes=(1000,),
    ),
    "imagenet-r": KnownDataset(
        "ImageNet-R",
        partial(open_wordnet_folders, subset="r", inside=("imagenet-r", "test")),
        f"{_TARS_OR}<WordNet id>/",
        "ood",
        aliases=("imagenet_r",),
        classes=(200,),
    ),
    "imagenet-a": KnownDataset(
        "ImageNet-A",
        partial(open_wordnet_folders, subset="a", inside=("imagenet-a", "test")),
        f"{_TARS_OR}<WordNet id>/",
        "ood",
        aliases=("imagenet_a",),
        classes=(200,),
    ),
    "imagenet_sketch": KnownDataset(
        "ImageNet-Sketch",
        partial(open_wordnet_folders, subset="", inside=("sketch", "test")),
        f"{_TARS_OR}<WordNet id>/",
        "ood",
        aliases=("imagenet-sketch", "sketch"),
        classes=(1000,),
    ),
    "objectnet": KnownDataset(
        "ObjectNet",
        open_objectnet,
        f"{_TARS_OR}images/<class>/ and mappings/",
        "ood",
        aliases=("objectnet-1.0",),
        classes=(113,),
    ),
    "caltech101": _zero_shot(
        "Caltech",
        "101_ObjectCategories, split_zhou_Caltech101.json",
        ("caltech-101",),
        "caltech101",
        _layouts(
            ("Caltech101", ("101_ObjectCategories",)),
            {"torchvision": open_caltech},
        ),
        (100, 101, 102),
    ),
    "flowers": _zero_shot(
        "Flowers",
        "flowers-102 in torchvision's layout, split_zhou_OxfordFlowers.json",
        ("flowers102", "flowers-102", "oxford_flowers"),
        "flowers",
        _layouts(
            ("OxfordFlowers", ("jpg",)),
            {"torchvision": _torchvision(folder="flowers-102", kind="Flowers102", names="flowers", split="test")},
        ),
        (102,),
    ),
    "food101": _zero_shot(
        "Food",
        "food-101 in torchvision's layout, split_zhou_Food101.json",
        ("food-101",),
        "food101",
        _layouts(
            ("Food101", ("images",)),
            {"torchvision": _torchvision(folder="food-101", kind="Food101", split="test")},
        ),
        (101,),
    ),
    "sun397": _zero_shot(
        "SUN",
        "SUN397 in torchvision's layout, split_zhou_SUN397.json",
        ("SUN397",),
        "sun397",
        _layouts(("SUN397", ("SUN397",)), {"torchvision": _torchvision(folder="SUN397", kind="SUN397")}),
        (397,),
    ),
    "dtd": _zero_shot(
        "DTD",
        "dtd/dtd in torchvision's layout, split_zhou_DescribableTextures.json",
        (),
        "dtd",
        _layouts(
            ("DescribableTextures", ("images",)),
            {"torchvision": _torchvision(folder="dtd/dtd", kind="DTD", split="test")},
        ),
        (47,),
    ),
    "fgvc_aircraft": _zero_shot(
        "Aircraft",
        "its images_variant_test.txt, variants.txt and images",
        ("fgvc-aircraft-2013b", "aircraft"),
        "fgvc_aircraft",
        _layouts(None, {"tables": layouts.aircraft}),
        (100,),
    ),
    "cars": _zero_shot(
        "Cars",
        "stanford_cars in torchvision's layout, split_zhou_StanfordCars.json",
        ("stanford_cars",),
        "cars",
        _layouts(
            ("StanfordCars", ("",)),
            {"torchvision": _torchvision(folder="stanford_cars", kind="StanfordCars", split="test")},
        ),
        (196,),
    ),
    "pets": _zero_shot(
        "Pets",
        "its annotations/test.txt and images, split_zhou_OxfordPets.json",
        ("oxford_pets", "oxford-iiit-pet"),
        "pets",
        _layouts(("OxfordPets", ("images",)), {"tables": layouts.pets}),
        (37,),
    ),
    "eurosat": _zero_shot(
        "EuroSAT",
        "eurosat/2750 in torchvision's layout, split_zhou_EuroSAT.json",
        ("EuroSAT",),
        "eurosat",
        _layouts(
            ("EuroSAT", ("2750", "")),
            {"torchvision": open_eurosat},
            names="eurosat",
        ),
        (10,),
    ),
    "ucf101": _zero_shot(
        "UCF",
        "UCF-101-midframes, split_zhou_UCF101.json",
        ("ucf-101", "UCF-101-midframes"),
        "ucf101",
        _layouts(("UCF101", ("UCF-101-midframes",)), {}),
        (101,),
    ),
    "iwildcam_id_val": _wilds_set("iWildCam ID val.", open_iwildcam_split, "id_val", None, "macro_f1"),
    "iwildcam_id": _wilds_set("iWildCam ID", open_iwildcam_split, "id_test", "id", "macro_f1"),
    "iwildcam_ood": _wilds_set("iWildCam OOD", open_iwildcam_split, "test", "ood", "macro_f1"),
    "fmow_id_val": _wilds_set("FMoW ID val.", open_fmow_split, "id_val", None, "top1"),
    "fmow_id": _wilds_set("FMoW ID", open_fmow_split, "id_test", "id", "top1"),
    "fmow_ood": _wilds_set("FMoW OOD", open_fmow_split, "test", "ood", "worst_region"),
    **{
        name: KnownDataset(
            title,
            partial(open_caption_set, name=name),
            f"CLIP-benchmark's tars with captions, or {file} and its images",
            None,
            "image_to_text_r1",
            (name.removesuffix("_captions"),),
        )
        for name, title, file in (
            ("flickr8k", "Flickr8k", "flickr8k_test_karpathy.txt"),
            ("flickr30k", "Flickr30k", "flickr30k_test_karpathy.txt"),
            ("mscoco_captions", "COCO", "coco_test_karpathy.json"),
        )
    },
}
IMAGENET_OOD_4 = ("imagenetv2", "imagenet-r", "imagenet-a", "imagenet_sketch")
"""ImageNet's shifts with ImageNet's own classes, unlike ObjectNet, which papers measure in different ways."""
IMAGENET_OOD = (*IMAGENET_OOD_4, "objectnet")
ZERO_SHOT_10 = (
    "caltech101",
    "flowers",
    "food101",
    "sun397",
    "dtd",
    "fgvc_aircraft",
    "cars",
    "pets",
    "eurosat",
    "ucf101",
)
SUITES: dict[str, tuple[str, ...]] = {
    "imagenet_ood": IMAGENET_OOD,
    "zeroshot10": ZERO_SHOT_10,
    "wilds": ("iwildcam_id", "iwildcam_ood", "fmow_id", "fmow_ood"),
    "retrieval": ("flickr8k", "flickr30k", "mscoco_captions"),
    "imagenet": ("imagenet1k", *IMAGENET_OOD, *ZERO_SHOT_10),
}


def expand_suites(names: list[str]) -> list[str]:
    """Names of data sets, with each suite replaced by its members; duplicates are dropped, the order is kept.

    Raises:
        ConfigError: a name is unknown; the message suggests the nearest one.
    """
    datasets: dict[str, None] = {}
    for name in names:
        datasets |= dict.fromkeys(SUITES.get(name) or (name,))
    for name in datasets:
        find_dataset(name)
    return list(datasets)


def find_dataset(name: str) -> KnownDataset:
    """The data set of this name or alias; CLIP-benchmark's prefixes ``wds/`` and ``vtab/`` are ignored.

    Raises:
        ConfigError: the name is unknown; the message suggests the nearest one.
    """
    bare = canonical_name(name)
    if bare not in KNOWN:
        words = [*KNOWN, *SUITES]
        raise ConfigError(f"no data set is known as {name}{nearest(bare, words)} (known: {', '.join(KNOWN)})")
    return KNOWN[bare]


def canonical_name(name: str) -> str:
    """The catalog's name of a data set, from this name or an unambiguous alias; unknown names stay as they are."""
    bare = name.removeprefix("wds/").removeprefix("vtab/")
    if bare in KNOWN:
        return bare
    matches = [canonical for canonical, known in KNOWN.items() if bare in known.aliases]
    return matches[0] if len(matches) == 1 else bare


def open_known(
    name: str, path: str, class_names: str | None = None, templates: str | None = None
) -> Labelled | Captioned:
    """Opens a known data set in any of its layouts, in the folder itself or below it.

    Args:
        path: its folder, or the parent; ``{dataset}`` is replaced by the name or one of its aliases.
        class_names, templates: replacements for the data set's own, by name or file.

    Raises:
        ConfigError: the name is unknown.
        DataError: the data set is broken, or not there; the message says which layouts are accepted.
    """
    known, bare = find_dataset(name), canonical_name(name)
    candidates = candidate_folders(name, path)
    folders = [folder for folder in candidates if folder.is_dir()]
    for folder in folders:
        data = known.open(folder)
        if data is None:
            continue
        return data if isinstance(data, Captioned) else _with_prompts(data, known, class_names, templates, folder)
    searched = ", ".join(map(str, folders)) or f"none of {', '.join(map(str, candidates[:3]))} exists"
    raise DataError(f"{path}: no {bare} found: expected {known.layout} (searched: {searched})")


def _with_prompts(
    data: Labelled, known: KnownDataset, class_names: str | None, templates: str | None, folder: Path
) -> Labelled:
    """The set with its final class names and templates, after the number of classes and all labels are checked."""
    labels = data.num_labels
    if labels not in known.classes:
        raise DataError(f"{folder}: {known.title} has {known.classes[0]} classes, but this folder has {labels}")
    names, lines = data.class_names, remark_on_repeated(data.class_names)
    if class_names is not None:
        names, folders = class_names_of(class_names), data.source.class_names
        if are_wordnet_ids(folders):
            names = join_names(data.source, names, class_names)
        if len(names) != len(data.class_names):
            raise DataError(
                f"{class_names}: {len(names)} class names, but {folder} has {len(data.class_names)} classes"
            )
        lines = remarks(names, folders, class_names)
    if class_names is None and (are_wordnet_ids(names) or are_numbers(names)):
        raise DataError(
            f"{folder}: its classes are numbered, e.g. {names[0]}, which makes no prompt; name them by "
            "class_names (--class-names), in the order of these numbers"
        )
    prompts = templates_of(templates) if templates is not None else data.templates or templates_of(known.templates)
    check_labels(data.source, names if data.members is None else tuple(map(str, data.members)))
    return replace(data, class_names=names, templates=prompts, remarks=tuple(lines))


def candidate_folders(name: str, path: str) -> list[Path]:
    """Folders that may hold the data set of this name, the likeliest first; arguments as in :func:`open_known`.

    Raises:
        ConfigError: the name is unknown.
    """
    names = (canonical_name(name), *find_dataset(name).aliases)
    forms = [form for alias in names for form in (alias, f"wds_{alias}", f"wds_vtab-{alias}", f"wds/{alias}")]
    if "{dataset}" in path:
        return [locate(path.replace("{dataset}", form)) for form in forms]
    root = locate(path)
    return [*(root / form for form in forms), root]
