"""The data sets that are known by name, and the suites of them that the paper's tables report."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from dive_fast.config.schema import Metric
from dive_fast.data.classes import are_numbers, are_wordnet_ids, join_names, remark_on_repeated, remarks
from dive_fast.data.prompts import check_labels
from dive_fast.data.sources.source import locate
from dive_fast.errors import ConfigError, DataError, nearest
from dive_fast.evaluate.datasets import layouts
from dive_fast.evaluate.datasets.class_names import class_names_of, templates_of
from dive_fast.evaluate.datasets.evaluation_set import Captioned, Labelled
from dive_fast.evaluate.datasets.openers import (
    open_caltech as open_caltech,
)
from dive_fast.evaluate.datasets.openers import (
    open_caption_set as open_caption_set,
)
from dive_fast.evaluate.datasets.openers import (
    open_eurosat as open_eurosat,
)
from dive_fast.evaluate.datasets.openers import (
    open_fmow_split as open_fmow_split,
)
from dive_fast.evaluate.datasets.openers import (
    open_imagenet_v2 as open_imagenet_v2,
)
from dive_fast.evaluate.datasets.openers import (
    open_iwildcam_split as open_iwildcam_split,
)
from dive_fast.evaluate.datasets.openers import (
    open_objectnet_set as open_objectnet_set,
)
from dive_fast.evaluate.datasets.openers import (
    open_simple as open_simple,
)
from dive_fast.evaluate.datasets.openers import (
    open_wordnet_folders as open_wordnet_folders,
)

Role = Literal["id", "ood", "zero_shot"]


@dataclass(frozen=True)
class Known:
    """A data set that is known by name."""

    title: str
    """Its column in tables."""
    open: Callable[[Path], Labelled | Captioned | None]
    """What lies in a folder, if it is the data set; templates may be missing."""
    layout: str
    """Of the folder, for messages."""
    role: Role | None = None
    metric: Metric = "top1"
    aliases: tuple[str, ...] = ()
    """Other names of its folder."""
    templates: str = "imagenet1k"
    classes: tuple[int, ...] = ()
    """How many classes it has; of more than one number, in different layouts."""


def _wilds_set(
    title: str, open_split: Callable[..., Labelled | None], split: str, role: Role | None, metric: Metric
) -> Known:
    if open_split is open_iwildcam_split:
        name, folder, tables, classes = "iwildcam", "iwildcam_v2.0", "metadata.csv, categories.csv, train/", 182
    else:
        name, folder, classes = "fmow", "fmow_v1.1", 62
        tables = "rgb_metadata.csv, country_code_mapping.csv, images/"
    return Known(
        title,
        partial(open_split, split=split),
        f"{folder} as WILDS has it ({tables})",
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
    ways: dict[str, layouts.Layout],
    classes: tuple[int, ...],
) -> Known:
    layout = f"CLIP-benchmark's tars (test/*.tar, classnames.txt), {layout}, or one folder a class in test"
    return Known(title, partial(open_simple, ways=ways), layout, "zero_shot", "top1", aliases, templates, classes)


def _ways(
    coop: tuple[str, tuple[str, ...]] | None, own: dict[str, layouts.Layout], names: str | None = None
) -> dict[str, layouts.Layout]:
    ways: dict[str, layouts.Layout] = {}
    if coop is not None:
        ways["coop"] = partial(layouts.coop, split=f"split_zhou_{coop[0]}.json", images=coop[1])
    return ways | own | {"folders": partial(layouts.class_folders, names=names)}


_V = partial(partial, layouts.torchvision)
_TARS_OR = "CLIP-benchmark's tars (test/*.tar, classnames.txt) or "
KNOWN: dict[str, Known] = {
    "imagenet1k": Known(
        "ImageNet",
        partial(open_wordnet_folders, subset="", inside=("val",)),
        f"{_TARS_OR}val/<WordNet id>/",
        "id",
        aliases=("imagenet", "imagenet-1k", "ILSVRC2012"),
        classes=(1000,),
    ),
    "imagenetv2": Known(
        "ImageNet-V2",
        open_imagenet_v2,
        f"{_TARS_OR}ImageNetV2-matched-frequency/<0 to 999>/",
        "ood",
        aliases=("imagenet-v2", "ImageNetV2", "imagenetv2-matched-frequency-format-val"),
        classes=(1000,),
    ),
    "imagenet-r": Known(
        "ImageNet-R",
        partial(open_wordnet_folders, subset="r", inside=("imagenet-r", "test")),
        f"{_TARS_OR}<WordNet id>/",
        "ood",
        aliases=("imagenet_r",),
        classes=(200,),
    ),
    "imagenet-a": Known(
        "ImageNet-A",
        partial(open_wordnet_folders, subset="a", inside=("imagenet-a", "test")),
        f"{_TARS_OR}<WordNet id>/",
        "ood",
        aliases=("imagenet_a",),
        classes=(200,),
    ),
    "imagenet_sketch": Known(
        "ImageNet-Sketch",
        partial(open_wordnet_folders, subset="", inside=("sketch", "test")),
        f"{_TARS_OR}<WordNet id>/",
        "ood",
        aliases=("imagenet-sketch", "sketch"),
        classes=(1000,),
    ),
    "objectnet": Known(
        "ObjectNet",
        open_objectnet_set,
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
        _ways(
            ("Caltech101", ("101_ObjectCategories",)),
            {"torchvision": open_caltech},
        ),
        (100, 101, 102),
    ),
    "flowers": _zero_shot(
        "Flowers",
        "flowers-102 as torchvision has it, split_zhou_OxfordFlowers.json",
        ("flowers102", "flowers-102", "oxford_flowers"),
        "flowers",
        _ways(
            ("OxfordFlowers", ("jpg",)),
            {"torchvision": _V(folder="flowers-102", kind="Flowers102", names="flowers", split="test")},
        ),
        (102,),
    ),
    "food101": _zero_shot(
        "Food",
        "food-101 as torchvision has it, split_zhou_Food101.json",
        ("food-101",),
        "food101",
        _ways(("Food101", ("images",)), {"torchvision": _V(folder="food-101", kind="Food101", split="test")}),
        (101,),
    ),
    "sun397": _zero_shot(
        "SUN",
        "SUN397 as torchvision has it, split_zhou_SUN397.json",
        ("SUN397",),
        "sun397",
        _ways(("SUN397", ("SUN397",)), {"torchvision": _V(folder="SUN397", kind="SUN397")}),
        (397,),
    ),
    "dtd": _zero_shot(
        "DTD",
        "dtd/dtd as torchvision has it, split_zhou_DescribableTextures.json",
        (),
        "dtd",
        _ways(
            ("DescribableTextures", ("images",)),
            {"torchvision": _V(folder="dtd/dtd", kind="DTD", split="test")},
        ),
        (47,),
    ),
    "fgvc_aircraft": _zero_shot(
        "Aircraft",
        "its images_variant_test.txt, variants.txt and images",
        ("fgvc-aircraft-2013b", "aircraft"),
        "fgvc_aircraft",
        _ways(None, {"tables": layouts.aircraft}),
        (100,),
    ),
    "cars": _zero_shot(
        "Cars",
        "stanford_cars as torchvision has it, split_zhou_StanfordCars.json",
        ("stanford_cars",),
        "cars",
        _ways(
            ("StanfordCars", ("",)), {"torchvision": _V(folder="stanford_cars", kind="StanfordCars", split="test")}
        ),
        (196,),
    ),
    "pets": _zero_shot(
        "Pets",
        "its annotations/test.txt and images, split_zhou_OxfordPets.json",
        ("oxford_pets", "oxford-iiit-pet"),
        "pets",
        _ways(("OxfordPets", ("images",)), {"tables": layouts.pets}),
        (37,),
    ),
    "eurosat": _zero_shot(
        "EuroSAT",
        "eurosat/2750 as torchvision has it, split_zhou_EuroSAT.json",
        ("EuroSAT",),
        "eurosat",
        _ways(
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
        _ways(("UCF101", ("UCF-101-midframes",)), {}),
        (101,),
    ),
    "iwildcam_id_val": _wilds_set("iWildCam ID val.", open_iwildcam_split, "id_val", None, "macro_f1"),
    "iwildcam_id": _wilds_set("iWildCam ID", open_iwildcam_split, "id_test", "id", "macro_f1"),
    "iwildcam_ood": _wilds_set("iWildCam OOD", open_iwildcam_split, "test", "ood", "macro_f1"),
    "fmow_id_val": _wilds_set("FMoW ID val.", open_fmow_split, "id_val", None, "top1"),
    "fmow_id": _wilds_set("FMoW ID", open_fmow_split, "id_test", "id", "top1"),
    "fmow_ood": _wilds_set("FMoW OOD", open_fmow_split, "test", "ood", "worst_region"),
    **{
        name: Known(
            title,
            partial(open_caption_set, name=name),
            f"CLIP-benchmark's tars with captions, or {file} and its images",
            None,
            "image_to_text_r1",
            (name.removesuffix("open_caption_set"),),
        )
        for name, title, file in (
            ("flickr8k", "Flickr8k", "flickr8k_test_karpathy.txt"),
            ("flickr30k", "Flickr30k", "flickr30k_test_karpathy.txt"),
            ("mscoco_captions", "COCO", "coco_test_karpathy.json"),
        )
    },
}
IMAGENET_OOD = ("imagenetv2", "imagenet-r", "imagenet-a", "imagenet_sketch", "objectnet")
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


def expand(names: list[str]) -> list[str]:
    """Data sets that suites and data sets stand for, each once, in order.

    Raises:
        ConfigError: an unknown name; says the nearest one.
    """
    found: dict[str, None] = {}
    for name in names:
        found |= dict.fromkeys(SUITES.get(name) or (name,))
    for name in found:
        find(name)
    return list(found)


def find(name: str) -> Known:
    """The data set of that name, a name of CLIP-benchmark's with ``wds/`` or ``vtab/`` before it included.

    Raises:
        ConfigError: there is none; says the nearest one.
    """
    bare = canonical(name)
    if bare not in KNOWN:
        words = [*KNOWN, *SUITES]
        raise ConfigError(f"no data set is known as {name}{nearest(bare, words)} (known: {', '.join(KNOWN)})")
    return KNOWN[bare]


def canonical(name: str) -> str:
    """A data set's own name, from that or another one of it."""
    bare = name.removeprefix("wds/").removeprefix("vtab/")
    if bare in KNOWN:
        return bare
    owners = [own for own, known in KNOWN.items() if bare in known.aliases]
    return owners[0] if len(owners) == 1 else bare


def open_known(
    name: str, place: str, class_names: str | None = None, templates: str | None = None
) -> Labelled | Captioned:
    """A known data set, wherever in a place and in whichever of its layouts it lies.

    Args:
        place: its folder, or one above; ``{dataset}`` stands for its name, or another one it goes by.
        class_names, templates: others than its own, by name or file.

    Raises:
        ConfigError: no such data set.
        DataError: it is not there; says what was expected. Or it is broken.
    """
    known, bare = find(name), canonical(name)
    looked = _folders(place, bare, known)
    there = [folder for folder in looked if folder.is_dir()]
    for folder in there:
        found = known.open(folder)
        if found is None:
            continue
        return (
            found if isinstance(found, Captioned) else _with_prompts(found, known, class_names, templates, folder)
        )
    where = ", ".join(map(str, there)) or f"none of {', '.join(map(str, looked[:3]))} is there"
    raise DataError(f"{place}: no {bare} found: expected {known.layout} (looked in: {where})")


def _with_prompts(
    found: Labelled, known: Known, class_names: str | None, templates: str | None, folder: Path
) -> Labelled:
    labels = found.num_labels
    if labels not in known.classes:
        raise DataError(f"{folder}: {known.title} has {known.classes[0]} classes, but {labels} lie there")
    names, said = found.class_names, remark_on_repeated(found.class_names)
    if class_names is not None:
        names, folders = class_names_of(class_names), found.source.class_names
        if are_wordnet_ids(folders):
            names = join_names(found.source, names, class_names)
        if len(names) != len(found.class_names):
            raise DataError(
                f"{class_names}: {len(names)} class names, but {folder} has {len(found.class_names)} classes"
            )
        said = remarks(names, folders, class_names)
    if class_names is None and (are_wordnet_ids(names) or are_numbers(names)):
        raise DataError(
            f"{folder}: its classes are called by number, e.g. {names[0]}, which makes no prompt; name them by "
            "class_names (--class-names), in the order of these numbers"
        )
    prompts = (
        templates_of(templates) if templates is not None else found.templates or templates_of(known.templates)
    )
    check_labels(found.source, names if found.members is None else tuple(map(str, found.members)))
    return replace(found, class_names=names, templates=prompts, remarks=tuple(said))


def _folders(place: str, name: str, known: Known) -> list[Path]:
    """Where it may lie, the likeliest first."""
    names = (name, *known.aliases)
    forms = [form for own in names for form in (own, f"wds_{own}", f"wds_vtab-{own}", f"wds/{own}")]
    if "{dataset}" in place:
        return [locate(place.replace("{dataset}", form)) for form in forms]
    root = locate(place)
    return [*(root / form for form in forms), root]
