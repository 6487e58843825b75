"""Known data sets in all their layouts on disk, written by hand with one image per class."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image

from dive_fast.data.classes import synsets
from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.transforms import Preprocess
from dive_fast.errors import ConfigError, DataError
from dive_fast.evaluation.datasets import class_names, imagenet, wilds
from dive_fast.evaluation.datasets.catalog import KNOWN, SUITES, canonical_name, expand_suites, open_known
from dive_fast.evaluation.datasets.evaluation_set import Captioned, Labelled
from dive_fast.evaluation.datasets.strict_samples import StrictSamples
from dive_fast.evaluation.scores import Predictions, scores

JPEG = tiny.jpeg(0)
ONE = "a photo of a {}."


def put(path: Path, content: bytes = JPEG) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def opened(name: str, path: Path | str, **options: Any) -> Labelled:
    """Opens a data set with a single template, since templates by name need CLIP-benchmark."""
    data = open_known(name, str(path), **({"templates": ONE} | options))
    assert isinstance(data, Labelled)
    return data


def labels(data: Labelled) -> dict[str, int]:
    """Label of each class folder."""
    return {sample.path.parent.name: sample.label for sample in data.source.samples}


# ImageNet and its shifts


@pytest.mark.parametrize(("name", "subset"), [("imagenet-r", "r"), ("imagenet-a", "a")])
def test_imagenet_subset_folders_map_to_wordnet_ids(tmp_path: Path, name: str, subset: str) -> None:
    all_wnids, wnids = synsets(), synsets(subset)
    assert (len(all_wnids), len(wnids)) == (1000, 200)
    for wnid in wnids:
        put(tmp_path / name / wnid / "a.jpg")
    data = opened(name, tmp_path)
    assert data.layout == "folders"
    # Labels index the subset; names are those of the same classes in ImageNet.
    for wnid, label in labels(data).items():
        assert data.class_names[label] == open_clip.IMAGENET_CLASSNAMES[all_wnids.index(wnid)]
    assert sorted(labels(data).values()) == list(range(200))
    shutil.rmtree(tmp_path / name / wnids[7])
    with pytest.raises(DataError, match=f"200 folders named by WordNet id: 1 are missing, e.g. {wnids[7]}$"):
        opened(name, tmp_path)
    put(tmp_path / name / wnids[7] / "a.jpg")
    put(tmp_path / name / "n99999999" / "a.jpg")
    with pytest.raises(DataError, match="n99999999 is not one of them"):
        opened(name, tmp_path)


def test_classes_of_subset_start_with_known_classes() -> None:
    # Goldfish, class 1 of ImageNet, is the first of ImageNet-R; stingray, class 6, the first of ImageNet-A.
    assert (imagenet.classes_of("r")[0], imagenet.classes_of("a")[0]) == (1, 6)
    assert open_clip.IMAGENET_CLASSNAMES[imagenet.classes_of("r")[0]] == "goldfish"
    assert open_clip.IMAGENET_CLASSNAMES[imagenet.classes_of("a")[0]] == "stingray"


def test_imagenet_v2_folders_are_numbers(tmp_path: Path) -> None:
    for label in range(1000):
        put(tmp_path / f"imagenetv2/ImageNetV2-matched-frequency/{label}/{label}.jpeg")
    data = opened("imagenetv2", tmp_path / "{dataset}")
    assert {int(name): label for name, label in labels(data).items()} == {label: label for label in range(1000)}
    assert data.class_names == tuple(open_clip.IMAGENET_CLASSNAMES)
    # In the order of names, 10 would be the third folder.
    assert labels(data)["10"] == 10


def write_objectnet(root: Path) -> None:
    """Writes 113 classes; the first maps to two ImageNet classes, whose names are resolved in two steps."""
    classes = [f"Thing {number:03d}" for number in range(113)]
    folders = {f"folder_{number:03d}": name for number, name in enumerate(classes)}
    labels = [f"label {row}, with comma" for row in range(1000)]
    # The ids of 2012 number the classes differently.
    ids = {str(row): (row + 17) % 1000 for row in range(1000)}
    joined = {name: labels[300 + number] for number, name in enumerate(classes)}
    joined[classes[0]] = f"{labels[5]}; {labels[700]}"
    texts = {
        "folder_to_objectnet_label.json": json.dumps(folders | {"folder_more": "Unknown to ImageNet"}),
        "objectnet_to_imagenet_1k.json": json.dumps(joined),
        "pytorch_to_imagenet_2012_id.json": json.dumps(ids),
        "imagenet_to_label_2012_v2": "\n".join(labels) + "\n",
    }
    for file, text in texts.items():
        put(root / "mappings" / file, text.encode())
    for folder in [*folders, "folder_more"]:
        put(root / "images" / folder / "a.jpg")


def test_objectnet_members_and_border(tmp_path: Path) -> None:
    root = tmp_path / "objectnet/objectnet-1.0"
    write_objectnet(root)
    data = opened("objectnet", tmp_path)
    assert len(data.source) == 113  # classes that ImageNet lacks are left out
    assert labels(data) == {f"folder_{number:03d}": number for number in range(113)}
    assert data.members is not None
    assert data.members[0] == ((5 - 17) % 1000, (700 - 17) % 1000)
    assert data.members[4] == ((304 - 17) % 1000,)
    assert len(data.class_names) == 1000
    bordered = Image.new("RGB", (36, 30), "red")
    bordered.paste(Image.new("RGB", (32, 26), "blue"), (2, 2))
    samples = StrictSamples(data.source, Preprocess((8, 8), (0,) * 3, (1,) * 3, "bicubic", "squash"), data.border)
    assert np.unique(np.asarray(samples.transform((0, 0), bordered)).reshape(-1, 3), axis=0).tolist() == [
        [0, 0, 255]
    ]
    with pytest.raises(DataError, match="no larger than its border of 2 pixels"):
        samples.transform((0, 0), Image.new("RGB", (4, 9)))
    (root / "mappings/pytorch_to_imagenet_2012_id.json").unlink()
    with pytest.raises(DataError, match=r"pytorch_to_imagenet_2012_id.json: cannot read ObjectNet's map"):
        opened("objectnet", tmp_path)
    with pytest.raises(DataError, match="no larger than its border of 2 pixels"):
        samples.view((0, 0), (4, 9))


@pytest.mark.parametrize("mode", ["squash", "shortest"])
def test_views_of_loaders_leave_out_the_border(tmp_path: Path, mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 36, 3), np.uint8)
    (tmp_path / "0").mkdir()
    Image.fromarray(noise).save(tmp_path / "0/a.png")
    preprocess = Preprocess((8, 8), (0.0,) * 3, (1.0,) * 3, "bicubic", mode)
    samples = StrictSamples(open_folder(str(tmp_path)), preprocess, 2)
    expected = np.asarray(samples.transform((0, 0), Image.fromarray(noise)))
    (batch,) = batches_of(samples, [(0, 0)], 1, Options())
    assert np.array_equal((batch.images[0] * 255).round().permute(1, 2, 0).numpy(), expected)


# The ten zero-shot sets


def write_wds(root: Path, classes: int, templates: str | None = "a photo of a {c}.\n") -> None:
    samples = {f"s{label:07d}": {"jpg": JPEG, "cls": str(label).encode()} for label in range(classes)}
    tiny.write_tar(root / "test/0.tar", samples)
    put(root / "test/nshards.txt", b"1\n")
    put(root / "classnames.txt", "".join(f"class {label}\n" for label in range(classes)).encode())
    if templates is not None:
        put(root / "zeroshot_classification_templates.txt", templates.encode())


@pytest.mark.parametrize("folder", ["food101", "wds_food101", "wds/food101", "wds_vtab-food101", "food-101"])
def test_clip_benchmark_tars_have_names_and_templates(tmp_path: Path, folder: str) -> None:
    write_wds(tmp_path / folder, 101)
    data = open_known("food101", f"{tmp_path}/{{dataset}}")
    assert isinstance(data, Labelled)
    assert data.layout == "webdataset"
    assert [sample.label for sample in data.source.samples] == list(range(101))
    assert data.class_names[7] == "class 7"
    assert [template("cat") for template in data.templates] == ["a photo of a cat."]
    put(tmp_path / folder / "test/nshards.txt", b"2")
    with pytest.raises(DataError, match=r"1 tars, but nshards.txt says 2; get the others"):
        opened("food101", tmp_path)


def write_coop(root: Path, file: str, images: str, classes: int) -> None:
    entries = [[f"some_{label}/{label}.jpg", label, f"some_{label}"] for label in range(classes)]
    for path, _, _ in entries:
        put(root / images / str(path))
    put(root / file, json.dumps({"train": entries, "val": [], "test": entries[::-1]}).encode())


@pytest.mark.parametrize(
    ("name", "folder", "file", "images", "classes"),
    [
        ("caltech101", "caltech-101", "split_zhou_Caltech101.json", "101_ObjectCategories", 100),
        ("flowers", "oxford_flowers", "split_zhou_OxfordFlowers.json", "jpg", 102),
        ("food101", "food-101", "split_zhou_Food101.json", "images", 101),
        ("sun397", "sun397", "split_zhou_SUN397.json", "SUN397", 397),
        ("dtd", "dtd", "split_zhou_DescribableTextures.json", "images", 47),
        ("cars", "stanford_cars", "split_zhou_StanfordCars.json", "", 196),
        ("pets", "oxford_pets", "split_zhou_OxfordPets.json", "images", 37),
        ("eurosat", "eurosat", "split_zhou_EuroSAT.json", "2750", 10),
        ("ucf101", "ucf101", "split_zhou_UCF101.json", "UCF-101-midframes", 101),
    ],
)
def test_coop_splits_are_opened(
    tmp_path: Path, name: str, folder: str, file: str, images: str, classes: int
) -> None:
    write_coop(tmp_path / folder, file, images, classes)
    data = opened(name, tmp_path)
    assert data.layout == "coop"
    assert labels(data) == {f"some_{label}": label for label in range(classes)}
    assert data.class_names[3] == "some 3"
    (tmp_path / folder / images / "some_3/3.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of .* images are missing, e.g. .*some_3/3.jpg"):
        opened(name, tmp_path)


def test_torchvision_folders_are_opened(tmp_path: Path) -> None:
    kinds = [f"dish_{label:03d}" for label in range(101)]
    meta = {kind: [f"{kind}/{kind}"] for kind in kinds}
    put(tmp_path / "food-101/meta/test.json", json.dumps(meta).encode())
    for kind in kinds:
        put(tmp_path / f"food-101/images/{kind}/{kind}.jpg")
        put(tmp_path / f"food-101/images/{kind}/train.jpg")
    for path in (tmp_path, tmp_path / "food-101"):
        data = opened("food101", path)
        assert data.layout == "torchvision"
        assert labels(data) == {kind: label for label, kind in enumerate(kinds)}
        assert data.class_names[1] == "dish 001"
    textures = [f"texture{label:02d}" for label in range(47)]
    lines = "".join(f"{texture}/a.jpg\n" for texture in textures[::-1])
    put(tmp_path / "dtd/dtd/labels/test1.txt", lines.encode())
    (tmp_path / "dtd/dtd/labels").mkdir(exist_ok=True)
    for texture in textures:
        put(tmp_path / f"dtd/dtd/images/{texture}/a.jpg")
    data = opened("dtd", tmp_path / "{dataset}")
    assert (data.layout, labels(data)["texture46"]) == ("torchvision", 46)
    scenes = [f"{letter}/scene_{label}" for label, letter in zip(range(397), "abc" * 200, strict=False)]
    put(tmp_path / "SUN397/ClassName.txt", "".join(f"/{s[0]}/{s}\n" for s in scenes).replace("//", "/").encode())
    for scene in scenes:
        put(tmp_path / "SUN397" / scene[0] / scene / "sun_a.jpg")
    data = opened("sun397", tmp_path)
    assert data.layout == "torchvision"
    assert {labels(data)[f"scene_{i}"] for i in range(397)} == set(range(397))
    keys = [sample.key for sample in data.source.samples]
    assert keys == sorted(keys)  # not in the file system's order


def test_torchvision_mat_tables_of_cars_are_opened(tmp_path: Path) -> None:
    io_ = pytest.importorskip("scipy.io")
    root = tmp_path / "stanford_cars"
    makes = np.array([f"Make {label}" for label in range(196)], dtype=object)
    put(root / "cars_test/0000.jpg")
    (root / "devkit").mkdir()
    io_.savemat(root / "devkit/cars_meta.mat", {"class_names": makes})
    rows = np.array(
        [(label + 1, f"{label:04d}.jpg") for label in range(196)], dtype=[("class", "i4"), ("fname", "O")]
    )
    for label in range(196):
        put(root / f"cars_test/{label:04d}.jpg")
    io_.savemat(root / "cars_test_annos_withlabels.mat", {"annotations": rows})
    data = opened("cars", tmp_path)
    assert data.layout == "torchvision"
    assert {sample.path.name: sample.label for sample in data.source.samples}["0042.jpg"] == 42
    assert data.class_names[42] == "Make 42"


def test_tables_of_aircraft_and_pets_are_opened(tmp_path: Path) -> None:
    variants = [f"A{label:03d}/x" for label in range(100)]
    for folder in ("fgvc_aircraft", "fgvc_aircraft/data"):
        root = tmp_path / folder
        put(root / "variants.txt", "\n".join(variants).encode())
        lines = "".join(f"{7000 + label} {variant}\n" for label, variant in enumerate(variants))
        put(root / "images_variant_test.txt", lines.encode())
        for label in range(100):
            put(root / f"images/{7000 + label}.jpg")
        data = opened("fgvc_aircraft", tmp_path)
        assert data.class_names == tuple(variants)
        assert [sample.label for sample in data.source.samples] == list(range(100))
        shutil.rmtree(root)
    root = tmp_path / "pets/oxford-iiit-pet"
    lines = "".join(f"great_dog{label:02d}_{label + 1} {label + 1} 2 1\n" for label in range(37))
    put(root / "annotations/test.txt", lines.encode())
    for label in range(37):
        put(root / f"images/great_dog{label:02d}_{label + 1}.jpg")
    data = opened("pets", tmp_path)
    assert (data.class_names[4], len(data.source)) == ("Great Dog04", 37)


def test_class_folders_need_right_number_of_classes(tmp_path: Path) -> None:
    for label in range(37):
        put(tmp_path / f"pets/test/Breed_{label:02d}/a.jpg")
    data = opened("pets", tmp_path)
    assert (data.layout, data.class_names[2]) == ("folders", "Breed 02")
    shutil.rmtree(tmp_path / "pets/test/Breed_05")
    with pytest.raises(DataError, match="pets: Pets has 37 classes, but this folder has 36"):
        opened("pets", tmp_path)


def test_open_known_missing_names_expected_layout(tmp_path: Path) -> None:
    (tmp_path / "food101").mkdir()
    layout = "food-101 in torchvision's layout"
    message = rf"no food101 found: expected CLIP-benchmark's tars .*{layout}.*searched: .*/food101"
    with pytest.raises(DataError, match=message):
        opened("food101", tmp_path)
    with pytest.raises(DataError, match=r"no eurosat found: .* none of .*/nowhere/eurosat, .* exists"):
        opened("eurosat", tmp_path / "nowhere/{dataset}")
    with pytest.raises(ConfigError, match=r"no data set is known as food100; did you mean food101\?"):
        open_known("food100", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no data set is known as zeroshot9; did you mean zeroshot10\?"):
        expand_suites(["imagenet_ood", "zeroshot9"])
    assert expand_suites(["imagenet_ood", "imagenet-r", "wds/vtab/pets"]) == [
        *SUITES["imagenet_ood"],
        "wds/vtab/pets",
    ]
    assert [canonical_name(name) for name in ("stanford_cars", "wds/cars", "iwildcam", "mscoco")] == [
        "cars",
        "cars",
        "iwildcam",
        "mscoco_captions",
    ]


def test_templates_say_how_to_get_clip_benchmark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(class_names.templates_of("ucf101")) == 48
    assert "a example of the person performing Archery." in {
        t("Archery") for t in class_names.templates_of("ucf101")
    }
    prompts = [template("airport_hangar") for template in class_names.templates_of("fmow")]
    assert "aerial photo of an airport hangar." in prompts
    assert "satellite photo of a airport_hangar in the americas." in prompts
    assert len(prompts) == 16
    class_names._read_package_json.cache_clear()
    monkeypatch.setattr(class_names.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="templates of food101 are CLIP-benchmark's: pip install clip-benchmark"):
        class_names.templates_of("food101")


def test_clip_benchmark_names_and_templates_are_valid() -> None:
    pytest.importorskip("clip_benchmark")
    class_names._read_package_json.cache_clear()
    for name in class_names.CLIP_BENCHMARK_TEMPLATES:
        prompts = [template("XX") for template in class_names.templates_of(name)]
        assert prompts
        assert all("XX" in prompt and "{" not in prompt for prompt in prompts)
    for name, count in {"caltech101": 101, "eurosat": 10, "flowers": 102, "pets": 37}.items():
        assert len(class_names.class_names_of(name)) == count
    assert class_names.class_names_of("caltech101")[0] == "off-center face"
    assert all(
        known.templates in (*class_names.CLIP_BENCHMARK_TEMPLATES, *class_names.EXTRA_TEMPLATES)
        for known in KNOWN.values()
    )


def test_eurosat_and_caltech_names_follow_folder_order(tmp_path: Path) -> None:
    pytest.importorskip("clip_benchmark")
    kinds = (
        "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
    )
    for kind in kinds.split():
        put(tmp_path / f"eurosat/2750/{kind}/{kind}_1.jpg")
    data = opened("eurosat", tmp_path)
    assert {kind: data.class_names[label] for kind, label in labels(data).items()}["River"] == "river"
    objects = ["BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "Motorbikes", "accordion"]
    for kind in [*objects, *(f"thing{number:02d}" for number in range(96))]:
        put(tmp_path / f"caltech101/101_ObjectCategories/{kind}/image_0001.jpg")
    data = opened("caltech101", tmp_path)
    assert len(data.source) == 101
    assert {kind: data.class_names[label] for kind, label in labels(data).items()}["Leopards"] == "leopard"


# WILDS


def write_iwildcam(root: Path) -> None:
    lines = ["image_id,filename,split,y,location_remapped,sequence_remapped,datetime"]
    splits = ["train", "val", "test", "id_val", "id_test"]
    for y in range(182):
        lines.append(f"i{y},f{y}.jpg,{splits[y % 5]},{y},{y},{y},2013-01-0{1 + y % 9} 10:00:00.000")
        put(root / f"train/f{y}.jpg")
    put(root / "metadata.csv", "\n".join(lines).encode())
    species = "".join(f"{y},{1000 + y},Genus species {y}\n" for y in range(181, -1, -1))
    put(root / "categories.csv", f"y,category_id,name\n99999,7,no one\n{species}".encode())
    put(root / "RELEASE_v2.0.txt", b"")


def write_fmow(root: Path, categories: list[str]) -> None:
    lines = ["split,img_filename,country_code,timestamp,category"]
    countries = ["FRA", "KEN", "CHN", "ZZZ", "BRA"]
    for row in range(500):
        split = ["train", "val", "test", "test", "seq"][row % 5]
        year = 2002 + (row * 7) % 16
        stamp = f"{year}-12-31T23:59:59Z" if row % 2 else f"{year}-01-01T00:00:00Z"
        lines.append(f"{split},x.png,{countries[row % 3 + row % 2]},{stamp},{categories[row % 62]}")
        put(root / f"images/rgb_img_{row}.png")
    put(root / "rgb_metadata.csv", "\n".join(lines).encode())
    regions = "alpha-3,region\nFRA,Europe\nKEN,Africa\nCHN,Asia\nBRA,Americas\n"
    put(root / "country_code_mapping.csv", regions.encode())
    put(root / "RELEASE_v1.1.txt", b"")


FMOW = [f"kind_{number:02d}" for number in range(62)]


def test_wilds_splits_have_regions(tmp_path: Path) -> None:
    write_iwildcam(tmp_path / "iwildcam_v2.0")
    data = opened("iwildcam_ood", tmp_path)
    assert [sample.label for sample in data.source.samples] == list(range(2, 182, 5))
    assert data.class_names[3] == "genus species 3"
    put(
        tmp_path / "iwildcam_v2.0/labels.csv",
        ("y,english\n" + "".join(f"{y},Cat {y}\n" for y in range(182))).encode(),
    )
    assert opened("iwildcam_id", tmp_path).class_names[3] == "cat 3"
    write_fmow(tmp_path / "fmow_v1.1", FMOW)
    ood, in_distribution = opened("fmow_ood", tmp_path), opened("fmow_id", tmp_path)
    assert ood.regions is not None
    assert set(ood.regions.names) <= {"Africa", "Americas", "Asia", "Europe", "Other"}
    assert len(ood.regions.of_sample) == len(ood.source)
    rows = (tmp_path / "fmow_v1.1/rgb_metadata.csv").read_text().splitlines()[1:]
    for data, period in ((ood, range(2016, 2100)), (in_distribution, range(1900, 2013))):
        expected = [r for r, row in enumerate(rows) if row[:5] == "test," and int(row.split(",")[3][:4]) in period]
        assert [sample.key for sample in data.source.samples] == [f"rgb_img_{row}.png" for row in expected]
        assert [sample.label for sample in data.source.samples] == [row % 62 for row in expected]
    (tmp_path / "fmow_v1.1/country_code_mapping.csv").write_text("code,region\n")
    with pytest.raises(DataError, match=r"country_code_mapping.csv: no column alpha-3"):
        opened("fmow_ood", tmp_path)


def test_wilds_splits_equal_the_package(tmp_path: Path) -> None:
    pytest.importorskip("wilds")
    from wilds.datasets.fmow_dataset import FMoWDataset, categories
    from wilds.datasets.iwildcam_dataset import IWildCamDataset

    write_fmow(tmp_path / "fmow_v1.1", categories)
    write_iwildcam(tmp_path / "iwildcam_v2.0")
    theirs = FMoWDataset(root_dir=str(tmp_path))
    for split in ("id_val", "id_test", "val", "test"):
        source, class_names, regions = wilds.open_fmow(tmp_path / "fmow_v1.1", split)
        rows = np.flatnonzero(theirs.split_array == theirs.split_dict[split])
        assert [sample.key for sample in source.samples] == [f"rgb_img_{theirs.full_idxs[r]}.png" for r in rows]
        assert [sample.label for sample in source.samples] == theirs.y_array[rows].tolist()
        assert list(class_names) == categories
        all_regions = theirs._metadata_map["region"]
        expected = [all_regions[int(theirs.metadata_array[r, 0])] for r in rows]
        assert [regions.names[int(region)] for region in regions.of_sample] == expected
    label = torch.tensor([sample.label for sample in source.samples])
    predicted = torch.where(torch.arange(len(label)) % 3 > 0, label, 0)
    # FMoW's own eval needs torch_scatter, so the worst region is computed here.
    right = (predicted == label).numpy()
    shares = [right[[name == region for name in expected]].mean() for region in set(expected) - {"Other"}]
    assert scores(Predictions(label, predicted, label), regions)["worst_region"] == pytest.approx(min(shares))
    animals = IWildCamDataset(root_dir=str(tmp_path))
    for split in ("id_val", "id_test", "val", "test"):
        source, _ = wilds.open_iwildcam(tmp_path / "iwildcam_v2.0", split)
        rows = np.flatnonzero(animals.split_array == animals.split_dict[split])
        assert [sample.key for sample in source.samples] == animals._input_array[rows].tolist()
        assert [sample.label for sample in source.samples] == animals.y_array[rows].tolist()
    label = animals.y_array[rows]
    predicted = torch.where(torch.arange(len(label)) % 3 > 0, label, 0)
    result, _ = animals.eval(predicted, label, None)
    metrics = scores(Predictions(label, predicted, label))
    assert metrics["macro_f1"] == pytest.approx(result["F1-macro_all"], abs=1e-6)


# Captions


def test_captions_are_grouped_by_image(tmp_path: Path) -> None:
    lines = "image,caption\n" + "".join(f"{i}.jpg,dog {i}, says {k}\n" for i in range(3) for k in range(5))
    put(tmp_path / "flickr8k/flickr8k_test_karpathy.txt", lines.encode())
    tree: dict[str, Any] = {"images": [], "annotations": []}
    samples = {}
    for i in range(3):
        put(tmp_path / f"flickr8k/Images/{i}.jpg")
        put(tmp_path / f"mscoco_captions/val2014/{i}.jpg")
        tree["images"].append({"id": 70 + i, "file_name": f"{i}.jpg"})
        captions = [f"dog {i}, says {k}" for k in range(5)]
        tree["annotations"] += [{"image_id": 70 + i, "caption": caption} for caption in captions]
        samples[f"s{i}"] = {"jpg": JPEG, "txt": "\n".join(captions).encode()}
    put(tmp_path / "mscoco_captions/coco_test_karpathy.json", json.dumps(tree).encode())
    tiny.write_tar(tmp_path / "wds_flickr30k/test/0.tar", samples)
    for name in ("flickr8k", "mscoco_captions", "flickr30k"):
        data = open_known(name, str(tmp_path))
        assert isinstance(data, Captioned)
        assert data.captions() == [tuple(f"dog {i}, says {k}" for k in range(5)) for i in range(3)]
        assert io.BytesIO(data.source.read(2)).getvalue() == JPEG


# Consistency of lists and tables


def test_imagenet_r_folders_and_names_are_checked(tmp_path: Path) -> None:
    for wnid in synsets("r"):
        put(tmp_path / "imagenet-r" / wnid / "a.jpg")
    (tmp_path / "imagenet-r/__MACOSX/n01443537").mkdir(parents=True)
    with pytest.raises(DataError, match="__MACOSX is not one of them"):
        opened("imagenet-r", tmp_path)
    shutil.rmtree(tmp_path / "imagenet-r/__MACOSX")
    put(tmp_path / "imagenet-r/n01443537/notes.txt", b"seen")
    assert len(opened("imagenet-r", tmp_path).source) == 200
    # ImageNet's 1000 names, joined to 200 folders by WordNet id.
    data = opened("imagenet-r", tmp_path, class_names="imagenet")
    assert data.class_names == opened("imagenet-r", tmp_path).class_names
    assert data.imagenet_rows == imagenet.classes_of("r")
    put(tmp_path / "names.txt", b"cat\ndog\n")
    with pytest.raises(DataError, match="2 class names, but the data set has 200 classes"):
        opened("imagenet-r", tmp_path, class_names=str(tmp_path / "names.txt"))


def test_objectnet_map_needs_unique_names(tmp_path: Path) -> None:
    root = tmp_path / "objectnet"
    write_objectnet(root)
    labels = (root / "mappings/imagenet_to_label_2012_v2").read_text().splitlines()
    # A name of two classes, such as "crane", is no problem unless ObjectNet refers to it.
    duplicated = [*labels[:998], labels[997], labels[999]]
    put(root / "mappings/imagenet_to_label_2012_v2", "\n".join(duplicated).encode())
    assert len(opened("objectnet", tmp_path).source) == 113
    duplicated = [*labels[:998], labels[301], labels[999]]
    put(root / "mappings/imagenet_to_label_2012_v2", "\n".join(duplicated).encode())
    with pytest.raises(DataError, match="map is inconsistent"):
        opened("objectnet", tmp_path)
    put(root / "mappings/imagenet_to_label_2012_v2", "\n".join(labels).encode())
    folders = json.loads((root / "mappings/folder_to_objectnet_label.json").read_text())
    put(root / "mappings/folder_to_objectnet_label.json", json.dumps(folders | {"new": "Thing 003"}).encode())
    with pytest.raises(DataError, match="two folders are called 'Thing 003'"):
        opened("objectnet", tmp_path)


def test_wilds_tables_inconsistent_raise(tmp_path: Path) -> None:
    root = tmp_path / "iwildcam_v2.0"
    write_iwildcam(root)
    valid = (root / "categories.csv").read_text()
    for table in (
        valid.replace("\n7,1007,", "\n8,1007,"),
        valid.replace("7,1007,Genus species 7\n", ""),
        valid + "7,1007,Another\n",
    ):
        (root / "categories.csv").write_text(table)
        with pytest.raises(
            DataError, match=r"its column y does not number the species 0, 1, 2, \.\.\., each once"
        ):
            opened("iwildcam_ood", tmp_path)
    (root / "categories.csv").write_text(valid.replace("Genus species 7\n", '"Genus species 7\n'))
    with pytest.raises(DataError, match=r"categories.csv: cannot read it|too many columns"):
        opened("iwildcam_ood", tmp_path)
    (root / "categories.csv").write_text(valid)
    (root / "train/f7.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of \d+ images are missing, e.g. .*f7.jpg"):
        opened("iwildcam_ood", tmp_path)


def test_captions_inconsistent_raise(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)]
    annotations = [{"image_id": i, "caption": f"dog {i}"} for i in range(3)]
    file = tmp_path / "mscoco_captions/coco_test_karpathy.json"
    for i in range(3):
        put(tmp_path / f"mscoco_captions/val2014/{i}.jpg")
        put(tmp_path / f"flickr8k/{i}.jpg")
    for bad_images, bad_annotations, message in (
        (images, annotations[:2], "1 images have no caption, e.g. 2.jpg"),
        (images[:2], annotations, "not COCO's captions: KeyError"),
        ([*images, images[0]], annotations, "two images have the same id"),
        (images, [*annotations, {"image_id": 0, "caption": " "}], "a caption of 0.jpg is empty"),
    ):
        put(file, json.dumps({"images": bad_images, "annotations": bad_annotations}).encode())
        with pytest.raises(DataError, match=message):
            open_known("mscoco_captions", str(tmp_path))
    # A file without a header would lose its first caption.
    put(tmp_path / "flickr8k/flickr8k_test_karpathy.txt", b"0.jpg,dog 0\n1.jpg,dog 1\n")
    with pytest.raises(DataError, match=r"expected the first line image,caption; found '0.jpg,dog 0'"):
        open_known("flickr8k", str(tmp_path))


def test_class_names_are_not_shifted(tmp_path: Path) -> None:
    write_wds(tmp_path / "caltech101", 101)
    names = (tmp_path / "caltech101/classnames.txt").read_text().splitlines()
    (tmp_path / "caltech101/classnames.txt").write_text("\n".join([*names[:5], "", *names[5:]]))
    with pytest.raises(DataError, match="line 6 is empty"):
        opened("caltech101", tmp_path)
    write_coop(tmp_path / "eurosat", "split_zhou_EuroSAT.json", "2750", 10)
    tree = json.loads((tmp_path / "eurosat/split_zhou_EuroSAT.json").read_text())
    tree["train"][3][2] = "another name"
    put(tmp_path / "eurosat/split_zhou_EuroSAT.json", json.dumps(tree).encode())
    with pytest.raises(DataError, match="label 3 is called both 'another name' and 'some_3'"):
        opened("eurosat", tmp_path)
    # Class folders named by number are no class names.
    for number in range(1, 103):
        put(tmp_path / f"flowers/test/{number}/a.jpg")
    with pytest.raises(DataError, match=r"its classes are numbered, e.g. 1, which makes no prompt"):
        opened("flowers", tmp_path)
    put(tmp_path / "flowers.txt", "".join(f"flower {number}\n" for number in range(1, 103)).encode())
    data = opened("flowers", tmp_path, class_names=str(tmp_path / "flowers.txt"))
    assert {int(folder): data.class_names[label] for folder, label in labels(data).items()} == {
        number: f"flower {number}" for number in range(1, 103)
    }


def test_imagenet_tars_have_rows_if_names_match(tmp_path: Path) -> None:
    write_wds(tmp_path / "imagenet-a", 200)
    assert opened("imagenet-a", tmp_path).imagenet_rows is None  # classes called "class 7"
    rows = imagenet.classes_of("a")
    class_names = [open_clip.IMAGENET_CLASSNAMES[row] for row in rows]
    class_names[5] = "an older name"
    put(tmp_path / "imagenet-a/classnames.txt", "\n".join(class_names).encode())
    assert opened("imagenet-a", tmp_path).imagenet_rows == rows
    put(tmp_path / "imagenet-a/classnames.txt", "\n".join(sorted(class_names)).encode())
    assert opened("imagenet-a", tmp_path).imagenet_rows is None
