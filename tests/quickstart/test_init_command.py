"""``dive-fast init`` as a user runs it: files that train as they are, a short summary, mistakes in one line."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from distributed import run_ranks
from test_inspect_data import rows, write_csv, write_photos, write_tar

from dive_fast.commands import init
from dive_fast.data.open_dataset import open_target
from dive_fast.distributed import join
from dive_fast.methods import registry
from dive_fast.methods.method import Part
from dive_fast.methods.run_config import RunConfig, load_run_config
from dive_fast.quickstart import new_config
from dive_fast.quickstart.choose_settings import batch_size
from dive_fast.training.loop import train


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", **{"red_car": 15, "SnowOwl": 10, "tree": 20})
    write_tar(tmp_path / "pairs.tar", 12, ".txt", lambda number: f"caption {number}")
    return tmp_path


def read(path: Path) -> RunConfig:
    return load_run_config(str(path))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error of a command, which must be one line."""
    capsys.readouterr()
    assert init.main(list(arguments)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_init_writes_config_and_class_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert init.main(["--target", "photos/"]) == 0
    output = capsys.readouterr().out
    assert sorted(set(folder.rglob("*")) - set(before)) == [folder / "photos.yaml", folder / "photos_classes.txt"]
    assert (folder / "photos_classes.txt").read_text() == "Snow Owl\nred car\ntree\n"
    config = read(folder / "photos.yaml")
    assert config.model.name == "ViT-B-16-quickgelu"
    assert config.model.pretrained == "openai"
    target, val = config.data.target, config.evaluate.sets["val"]
    assert (
        (target.format, target.path, target.holdout)
        == ("folder", "photos", 0.2)
        == (val.format, val.path, val.holdout)
    )
    assert target.class_names == val.class_names == "photos_classes.txt"
    assert target.templates == val.templates == "a photo of a {}"
    assert target.batch_size == batch_size(36) == 8
    assert config.data.reference is None
    assert config.objective.name == "tracer"
    assert (config.train.epochs, config.train.warmup_steps, config.train.learning_rate) == (50, 20, 1e-5)
    assert (config.evaluate.select, config.evaluate.every_epochs, config.evaluate.patience) == ("val", 2, 5)
    for line in (
        "target   photos: class folders, 45 images in 3 classes, typically 40 x 36 pixels",
        "         smallest class SnowOwl (10), largest tree (20), 2.0 times as many",
        "classes  photos_classes.txt, 2 changed for prompts; prompt: a photo of a {}",
        "         'red_car' -> 'red car'",
        "measure  9 of 45 images (20.0% of each class, at least 1) are held out, 36 train; no file is moved",
        "wrote    photos.yaml, photos_classes.txt",
        "next     dive-fast train --config photos.yaml",
    ):
        assert f"{line}\n" in output
    assert "COCO captions" in output


def test_init_with_reference_chooses_dive(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--target", "photos", "--reference", "pairs.tar", "--model", "demo", "--output", "my run.json"]
    assert init.main([*arguments, "--template", "a {} at night"]) == 0
    config = read(folder / "my run.json")
    assert config.model.name == "demo"
    assert config.objective.name == "dive"
    assert config.objective.weight == 0.1
    assert config.data.reference is not None
    assert (config.data.reference.path, config.data.reference.batch_size) == ("pairs.tar", 2)
    assert config.data.target.templates == "a {} at night"
    assert config.data.target.class_names == "my run_classes.txt"
    output = capsys.readouterr().out
    assert "keep     pairs.tar: 12 pairs, e.g. 'caption 0'\n" in output
    assert "next     dive-fast train --config 'my run.json'\n" in output
    text = (folder / "my run.json").read_text()
    assert text.startswith(f"// Written by: {shlex.join(['dive-fast', 'init', *arguments])}")
    assert sum(line.lstrip().startswith("//") for line in text.splitlines()) > 15


@pytest.mark.parametrize("name", list(registry.table().presets))
def test_init_config_of_every_method_is_valid(folder: Path, name: str) -> None:
    reference = ["--reference", "pairs.tar"] if registry.table().presets[name].reference else []
    assert init.main(["--target", "photos", "--method", name, *reference]) == 0
    assert read(folder / "photos.yaml").objective.name == name


def test_init_takes_precision_of_the_method_on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for has_gpu, expected in ((True, ("bf16", "fp16")), (False, ("fp32", "fp32"))):
        monkeypatch.setattr(new_config, "has_gpu", lambda has_gpu=has_gpu: has_gpu)
        assert init.main(["--target", "photos", "--force"]) == 0
        precisions = [read(folder / "photos.yaml").train.precision]
        assert init.main(["--target", "photos", "--reference", "pairs.tar", "--force"]) == 0
        assert (*precisions, read(folder / "photos.yaml").train.precision) == expected


def test_init_uses_splits_and_their_classes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos(folder / "set/train", a_b=10, c=10, d_e=10)
    write_photos(folder / "set/val", a_b=2, d_e=2)
    write_photos(folder / "set/test", a_b=2, c=2, d_e=2)
    assert init.main(["--target", "set"]) == 0
    config = read(folder / "set.yaml")
    assert config.data.target.holdout is None
    assert config.data.target.batch_size == 4
    val, test = config.evaluate.sets["val"], config.evaluate.sets["test"]
    assert (val.path, val.class_names) == ("set/val", "set_val_classes.txt")
    assert (test.path, test.class_names) == ("set/test", "set_classes.txt")
    assert (folder / "set_val_classes.txt").read_text() == "a b\nd e\n"
    assert (config.evaluate.select, config.evaluate.during) == ("val", ["val"])
    assert "is measured at the end" in capsys.readouterr().out


def test_init_of_tars_needs_class_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(folder / "set/0.tar", 20, ".cls", lambda number: str(number % 2))
    message = refused(capsys, "--target", "set/0.tar")
    assert message.startswith(
        "set/0.tar: labels 0 to 1, and no names for them".replace(", and no", " without")[:24]
    )
    (folder / "set/classes.txt").write_text("left\nright\n")
    assert init.main(["--target", "set"]) == 0
    config = read(folder / "set.yaml")
    assert (config.data.target.format, config.data.target.holdout) == ("webdataset", 0.2)
    assert (folder / "set_classes.txt").read_text() == "left\nright\n"
    (folder / "set/classes.txt").write_text("left\n")
    assert "has label 1, but there are 1 class names" in refused(capsys, "--target", "set", "--force")


def test_init_with_class_names_of_the_user(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "names.txt").write_text("owl\ncar\noak\n")
    assert init.main(["--target", "photos", "--class-names", "names.txt"]) == 0
    assert (folder / "photos_classes.txt").read_text() == "owl\ncar\noak\n"
    (folder / "names.txt").write_text("owl\n")
    assert "1 class names, but the data set has 3 classes" in refused(
        capsys, "--target", "photos", "--class-names", "names.txt", "--force"
    )


def test_init_of_csv_has_nothing_to_measure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(folder / "set", 12)
    assert init.main(["--target", "set/list.csv"]) == 0
    config = read(folder / "list.yaml")
    assert config.data.target.class_names is None
    assert not config.evaluate.sets
    assert not (folder / "list_classes.txt").exists()
    assert "measure  nothing to choose weights by: a csv has no classes" in capsys.readouterr().out


def test_init_of_huggingface_data_set_holds_out_of_its_training_split(folder: Path) -> None:
    datasets.DatasetDict({"train": rows(20), "test": rows(8)}).save_to_disk(folder / "hf")
    assert init.main(["--target", "hf"]) == 0
    config = read(folder / "hf.yaml")
    assert (config.data.target.split, config.data.target.holdout) == ("train", 0.2)
    val, test = config.evaluate.sets["val"], config.evaluate.sets["test"]
    assert (val.split, val.holdout, test.split, test.holdout) == ("train", 0.2, "test", None)
    assert (folder / "hf_classes.txt").read_text() == "b 1\na\n"
    train, held_out = open_target(config.data.target), open_target(val)
    assert (len(train), len(held_out)) == (16, 4)
    assert not {sample.key for sample in train.samples} & {sample.key for sample in held_out.samples}


def test_init_refuses_to_overwrite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "photos.yaml").write_text("mine")
    expected = "photos.yaml exists: name another file by --output, or replace it with --force"
    assert refused(capsys, "--target", "photos") == expected
    assert (folder / "photos.yaml").read_text() == "mine"
    (folder / "photos.yaml").unlink()
    (folder / "photos_classes.txt").write_text("mine")
    assert refused(capsys, "--target", "photos") == expected.replace(".yaml", "_classes.txt")
    assert not (folder / "photos.yaml").exists()
    assert init.main(["--target", "photos", "--force"]) == 0
    # Equal class names are no reason to refuse.
    assert init.main(["--target", "photos", "--format", "json"]) == 0
    assert read(folder / "photos.json") == read(folder / "photos.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--target", "photo"],
            "photo: no such file or folder; expected a folder with one folder of images per class",
        ),
        (["--target", "  "], "--target is empty"),
        (
            ["--target", "photos", "--reference", "photos"],
            "photos: no image-caption pairs; expected tars of image",
        ),
        (
            ["--target", "photos", "--method", "dive"],
            "--method dive needs a reference set: name one by --reference",
        ),
        (["--target", "photos", "--method", "dvie"], "--method dvie: no such method"),
        (
            ["--target", "photos", "--method", "flyp", "--reference", "pairs.tar"],
            "--method flyp uses no reference set",
        ),
        (["--target", "photos", "--model", "ViT-B-61"], "--model ViT-B-61: open_clip has no such model"),
        (["--target", "photos", "--template", "a photo"], "--template 'a photo': has no {} for the class name"),
        (["--target", "photos", "--output", "photos.txt"], "--output photos.txt: the name of a config ends with"),
        (["--target", "photos", "--output", "x.json", "--format", "yaml"], "--output x.json is not --format yaml"),
        (["--target", "photos", "--output", "no/x.yaml"], "no/x.yaml: cannot write it: No such file or directory"),
        (["--target", "caf\udce9"], "--target caf\\xe9: not valid UTF-8"),
    ],
)
def test_init_refuses_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(folder.rglob("*"))
    assert refused(capsys, *arguments).startswith(message)
    assert sorted(folder.rglob("*")) == before


def test_init_refuses_few_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos(folder / "few", cat=1, dog=1, owl=1)
    assert refused(capsys, "--target", "few") == "3 images to train on are too few: at least 8 are needed"


def test_init_with_single_images_trains_on_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos(folder / "set", **{f"c{number}": 1 for number in range(9)} | {"d": 3})
    assert init.main(["--target", "set"]) == 0
    output = capsys.readouterr().out
    assert "1 of 12 images" in output
    assert "9 classes have a single image, which trains: they are not measured" in output
    write_photos(folder / "one", **{f"c{number}": 1 for number in range(9)})
    assert init.main(["--target", "one"]) == 0
    assert not read(folder / "one.yaml").evaluate.sets
    assert "measure  nothing to choose weights by: no class has two images" in capsys.readouterr().out


def test_init_with_hostile_names_stays_short_and_valid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        "a b",
        "日本_城",
        "line\nbreak",
        "-x",
        "'q\"",
        "# c",
        "yes",
        "null",
        "{}",
        "x\u2028y",
        "\x1b[31m",
        "[z]",
    ]
    root = write_photos(folder / "a: b # ü\x7f", **{name: 3 for name in names})
    (root / "yes/x.heic").write_bytes(b"x")
    (root / "yes/.x.jpg").write_bytes(b"x")
    (root / "yes/0.jpg").write_bytes(b"broken")
    assert init.main(["--target", root.name]) == 0
    output = capsys.readouterr().out
    assert len(output.splitlines()) < 30
    assert all(line.isprintable() for line in output.splitlines())
    assert "left out: 1, images of suffix .heic are not read; the first: yes/x.heic" in output
    assert "cannot be decoded: 1 of 36 images that were tried; yes/0.jpg: not an image" in output
    (path,) = folder.glob("*.yaml")
    assert read(path).data.target.path == root.name


def tuned(folder: Path) -> dict[str, float]:
    os.chdir(folder)
    Part.backend = "torch"  # interpreted, the kernels would take most of the time
    config = read(folder / "photos.yaml")
    short = {"max_steps": 4, "warmup_steps": 1}
    config = config.model_copy(update={"train": config.train.model_copy(update=short)})
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"every_epochs": 1})})
    return train(config, Path("run"), join())


@pytest.mark.parametrize("reference", [[], ["--reference", "pairs.tar"]])
def test_config_of_init_trains_as_it_is(folder: Path, reference: list[str]) -> None:
    """The three commands, with the model of the demo: photos in folders, a config, a tuned model."""
    assert init.main(["--target", "photos", "--model", "demo", *reference]) == 0
    (results,) = run_ranks(1, tuned, folder, init=False)
    # Of the nine images that are held out.
    assert results["accuracy/val"] * 9 == pytest.approx(round(results["accuracy/val"] * 9))
    assert (folder / "run/model.safetensors").is_file()


def test_init_imports_neither_torch_nor_open_clip(folder: Path) -> None:
    code = (
        "import sys; from dive_fast.commands.console import main; "
        "code = main(sys.argv[1:]); sys.exit(code or sorted({'torch', 'open_clip'} & set(sys.modules)) or 0)"
    )
    command = [sys.executable, "-c", code, "init", "--target", "photos", "--reference", "pairs.tar"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
