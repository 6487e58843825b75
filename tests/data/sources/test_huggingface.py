"""Data sets of Hugging Face's `datasets` on disk: rows, columns, splits, and equal bytes for every reader."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import tiny
import torch

from dive_fast.commands.prepare import main as prepare_main
from dive_fast.config.schema import EvaluationSet, GeometryConfig, ReferenceConfig, TargetConfig
from dive_fast.data.loaders.loader import Options, batches_of
from dive_fast.data.open_dataset import open_reference, open_target
from dive_fast.data.prepared.read import open_prepared
from dive_fast.data.samples import EvaluationSamples
from dive_fast.data.sources import huggingface
from dive_fast.data.sources.huggingface import Columns, is_dataset, open_huggingface
from dive_fast.data.sources.source import Source
from dive_fast.data.transforms import Preprocess
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets.resolve import open_evaluation

NAMES = ["cat", "dog", "eel"]
COUNT = 12
FEATURES = datasets.Features(
    {
        "id": datasets.Value("int32"),
        "picture": datasets.Image(),
        "label": datasets.ClassLabel(names=NAMES),
        "caption": datasets.Value("string"),
        "captions": datasets.Sequence(datasets.Value("string")),
    }
)


def image(row: int) -> bytes:
    return tiny.jpeg(row, (30 + row, 24), "PNG" if row % 4 == 3 else "JPEG")


def rows(count: int = COUNT, **columns: list[Any]) -> dict[str, list[Any]]:
    return {
        "id": list(range(count)),
        "picture": [{"bytes": image(row), "path": None} for row in range(count)],
        "label": [row % 3 for row in range(count)],
        "caption": [f"caption {row}" for row in range(count)],
        "captions": [[f"caption {row}", f"another {row}"][: 1 + row % 2] for row in range(count)],
    } | columns


def dataset(**columns: list[Any]) -> Any:
    return datasets.Dataset.from_dict(rows(**columns), features=FEATURES)


@pytest.fixture(autouse=True)
def quiet(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    # Parquet files are converted there.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved DatasetDict; the split `train` has three arrow files."""
    folder = tmp_path_factory.mktemp("hf") / "set"
    splits = {"train": dataset(), "test": dataset().select([5, 2])}
    datasets.DatasetDict(splits).save_to_disk(folder, num_shards={"train": 3, "test": 1})
    return folder


def read(path: Path, split: str | None = "train", has_texts: bool = False, **columns: str) -> Source:
    return open_huggingface(str(path), Columns(**columns), split, has_texts=has_texts)


def error_of(path: Path, split: str | None = "train", has_texts: bool = False, **columns: str) -> str:
    with pytest.raises(DataError) as error:
        read(path, split, has_texts, **columns)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def rewrite(file: Path, change: Callable[[Any], Any], **options: Any) -> None:
    """Replaces an arrow file by one with a changed table."""
    with pyarrow.ipc.open_stream(file.read_bytes()) as reader:
        table = change(reader.read_all())
    with pyarrow.ipc.new_stream(str(file), table.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)


def test_rows_have_the_saved_bytes_labels_and_names(saved: Path) -> None:
    source = read(saved)
    assert source.class_names == tuple(NAMES)
    assert [sample.label for sample in source.samples] == [row % 3 for row in range(COUNT)]
    assert [sample.key for sample in source.samples] == [str(row) for row in range(COUNT)]
    assert [source.read(row) for row in range(COUNT)] == [image(row) for row in range(COUNT)]
    assert len({sample.path for sample in source.samples}) == 3
    assert not source.skipped
    test = read(saved, "test")
    assert [test.read(row) for row in range(2)] == [image(5), image(2)]


def test_source_is_read_alike_in_workers_and_by_fast_loaders(saved: Path) -> None:
    source = read(saved)
    # Workers get the positions of images, not the images.
    assert len(pickle.dumps(source)) < 200 * COUNT
    assert pickle.loads(pickle.dumps(source)).read(7) == image(7)
    preprocess = Preprocess((24, 24), (0.5,) * 3, (0.3,) * 3, "bicubic", "shortest")
    keys = [(0, row) for row in range(COUNT)]
    batches = [
        torch.cat([batch.images for batch in batches_of(EvaluationSamples(source, preprocess), keys, 4, options)])
        for options in (Options(), Options(workers=2), Options("dali"))
    ]
    assert torch.equal(batches[0], batches[1])
    assert float((batches[0] - batches[2]).abs().mean()) < 0.01
    for row in range(COUNT):
        assert torch.equal(batches[0][row], tiny.shown(preprocess, source.image(row)))


def test_digest_is_that_of_the_contents_wherever_and_however_they_are_stored(saved: Path, tmp_path: Path) -> None:
    expected = read(saved).digest()
    datasets.DatasetDict({"train": dataset()}).save_to_disk(tmp_path / "moved", num_shards={"train": 1})
    assert read(tmp_path / "moved").digest() == expected
    dataset().select(range(COUNT)).save_to_disk(tmp_path / "single", num_shards=2)
    assert read(tmp_path / "single", None).digest() == expected
    changes: list[Any] = [
        dataset(label=[0] * COUNT),
        dataset(picture=[{"bytes": image(row ^ 1), "path": None} for row in range(COUNT)]),
        dataset().select(list(reversed(range(COUNT)))),
        dataset().cast_column("label", datasets.ClassLabel(names=["cat", "dog", "fish"])),
    ]
    digests = {expected}
    for number, changed in enumerate(changes):
        changed.save_to_disk(tmp_path / str(number))
        digests.add(read(tmp_path / str(number), None).digest())
    assert len(digests) == 5


def test_rows_without_image_label_or_text_are_counted(tmp_path: Path) -> None:
    pictures: list[Any] = [{"bytes": image(row), "path": None} for row in range(COUNT)]
    pictures[1] = pictures[2] = None
    pictures[3] = {"bytes": b"", "path": None}
    labels = [0, 1, 2, 0, -1, None, *[1] * 6]
    captions = ["a", "b", "c", "d", " ", None, *["x"] * 6]
    captions_lists = [["a"], [], ["c"], ["d"], None, ["", "y"], *[["x"]] * 6]
    dataset(picture=pictures, label=labels, caption=captions, captions=captions_lists).save_to_disk(tmp_path)
    skipped = [("1", "no image"), ("2", "no image"), ("3", "no image"), ("4", "no label"), ("5", "no label")]
    assert list(read(tmp_path, None).skipped) == skipped
    assert [sample.key for sample in read(tmp_path, None).samples] == ["0", *map(str, range(6, COUNT))]
    texts = read(tmp_path, None, True, text="caption")
    assert [entry.key for entry in texts.skipped if "caption" in entry.reason] == ["4", "5"]
    lists = read(tmp_path, None, True, text="captions")
    assert [entry.key for entry in lists.skipped if "caption" in entry.reason] == ["4"]
    assert {sample.key: sample.texts for sample in lists.samples}["5"] == ("y",)


def test_set_without_any_usable_row_is_refused_with_the_reasons(tmp_path: Path) -> None:
    dataset(label=[-1] * COUNT).save_to_disk(tmp_path / "a")
    assert error_of(tmp_path / "a", None) == "no row has an image and a label (12 no label; the first: 0)"
    dataset().save_to_disk(tmp_path / "b")
    (file,) = (tmp_path / "b").glob("*.arrow")
    linked = pyarrow.array([{"bytes": None, "path": "/etc/hostname"}] * COUNT, FEATURES.arrow_schema.field(1).type)
    rewrite(file, lambda table: table.set_column(1, "picture", linked))
    message = "12 only the path of its image; save_to_disk stores the image itself; the first: 0"
    assert message in error_of(tmp_path / "b", None)


def test_columns_and_splits_are_validated_in_one_line(saved: Path, tmp_path: Path) -> None:
    listed = "id, picture, label, caption, captions"
    assert error_of(saved, None) == "it has the splits train, test; set split to one of them"
    assert error_of(saved, "tran") == "no split tran; did you mean train? (it has train, test)"
    assert error_of(saved, image="pictur") == f"no column pictur; did you mean picture? (it has {listed})"
    assert error_of(saved, label="nothing") == f"no column nothing (it has {listed})"
    assert error_of(saved, has_texts=True) == ("2 columns of texts; set text_column to one of caption, captions")
    assert "column id holds int32, not encoded images" in error_of(saved, image="id")
    assert "column picture holds struct" in error_of(saved, label="picture")
    assert error_of(saved, has_texts=True, text="id") == "column id holds integers, not texts"
    assert error_of(saved, label="captions") == "column captions holds lists; each image needs one label"
    assert "holds a single split; remove split" in error_of(saved / "train", "test")
    plain = dataset().remove_columns(["label", "picture"])
    plain.save_to_disk(tmp_path / "plain")
    assert (
        error_of(tmp_path / "plain", None) == "no image column; set image_column to one of id, caption, captions"
    )
    dataset().remove_columns("label").save_to_disk(tmp_path / "unlabelled")
    assert "no ClassLabel column; set label_column to one of id, " in error_of(tmp_path / "unlabelled", None)


def test_labels_may_be_texts_or_numbers_with_class_names(saved: Path, tmp_path: Path) -> None:
    dataset(caption=[["zebra", "ant"][row % 2] for row in range(COUNT)]).save_to_disk(tmp_path / "set")
    source = read(tmp_path / "set", None, label="caption")
    assert source.class_names == ("ant", "zebra")
    assert [sample.label for sample in source.samples[:3]] == [1, 0, 1]
    section = {"format": "huggingface", "path": str(tmp_path / "set"), "label_column": "id"}
    with pytest.raises(DataError, match=r"^data\.target: .*numbers without names; set class_names to a file"):
        open_target(TargetConfig.model_validate(section))
    (tmp_path / "names.txt").write_text("".join(f"name {row}\n" for row in range(COUNT)))
    named = open_target(TargetConfig.model_validate(section | {"class_names": str(tmp_path / "names.txt")}))
    assert [sample.label for sample in named.samples] == list(range(COUNT))


def test_sections_of_the_config_open_the_set(saved: Path) -> None:
    section = {"format": "huggingface", "path": str(saved), "split": "train"}
    assert open_target(TargetConfig.model_validate(section)).class_names == tuple(NAMES)
    prompts = open_target(TargetConfig.model_validate(section | {"text_column": "captions"}))
    assert prompts.samples[1].texts == ("caption 1", "another 1")
    for kind in (ReferenceConfig, GeometryConfig):
        pairs = open_reference(kind.model_validate(section | {"text_column": "caption"}))
        assert pairs.samples[3].texts == ("caption 3",)
    with pytest.raises(DataError, match=r"^data\.reference: .*: 2 columns of texts"):
        open_reference(ReferenceConfig.model_validate(section))
    labelled: Any = open_evaluation(EvaluationSet.model_validate(section | {"templates": "simple"}))
    assert labelled.class_names == tuple(NAMES)
    captioned: Any = open_evaluation(
        EvaluationSet.model_validate(section | {"task": "retrieval", "text_column": "captions"})
    )
    assert [len(captions) for captions in captioned.captions()] == [1, 2] * (COUNT // 2)


def test_parquet_files_are_read_by_split_and_again_when_they_change(tmp_path: Path) -> None:
    data = tmp_path / "set/data"
    data.mkdir(parents=True)
    dataset().select(range(7)).to_parquet(data / "train-00000-of-00002.parquet")
    dataset().select(range(7, COUNT)).to_parquet(data / "train-00001-of-00002.parquet")
    dataset().select([4]).to_parquet(data / "test-00000-of-00001.parquet")
    source = read(tmp_path / "set")
    assert source.class_names == tuple(NAMES)
    assert [source.read(row) for row in range(COUNT)] == [image(row) for row in range(COUNT)]
    assert "it has the splits" in error_of(tmp_path / "set", None)
    dataset(label=[2] * COUNT).select([4]).to_parquet(data / "test-00000-of-00001.parquet")
    assert [sample.label for sample in read(tmp_path / "set", "test").samples] == [2]


def test_detection_needs_the_files_of_a_data_set(saved: Path, tmp_path: Path) -> None:
    assert is_dataset(str(saved))
    assert is_dataset(str(saved / "train"))
    assert not is_dataset(str(tmp_path / "nothing"))
    for name, expected in (("data/train.parquet", True), ("00000.tar", False)):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
        assert is_dataset(str(tmp_path / "set")) == expected
    assert "no such folder; save the set there first" in error_of(tmp_path / "nothing", None)
    assert "neither dataset_dict.json nor state.json" in error_of(tmp_path / "set", None)


def test_prepare_reads_the_set(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--format", "huggingface", "--input", str(saved), "--split", "train", "--workers", "1"]
    assert prepare_main([*command, "--output", str(tmp_path / "labelled")]) == 0
    labelled = open_prepared(str(tmp_path / "labelled"), ".cls")
    assert labelled.class_names == tuple(NAMES)
    assert labelled.read(0) == image(0)  # a JPEG keeps its bytes
    captions = ["--text", "txt", "--text-column", "captions", "--output", str(tmp_path / "captioned")]
    assert prepare_main([*command, *captions]) == 0
    captioned = open_prepared(str(tmp_path / "captioned"), ".txt")
    assert captioned.samples[1].texts == ("caption 1", "another 1")
    assert prepare_main([*command[:4], "--output", str(tmp_path / "x")]) == 2
    assert "it has the splits train, test" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare_main([*command, "--text-column", "caption", "--output", str(tmp_path / "x")])
    assert "--text-column is for --text txt; add it" in capsys.readouterr().err


# Damaged and hostile sets


def test_truncated_arrow_file_is_refused(saved: Path, tmp_path: Path) -> None:
    dataset().save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    content = file.read_bytes()
    for size in (len(content) // 2, 100, 0):
        file.write_bytes(content[:size])
        assert error_of(tmp_path / "set", None)


def test_offsets_out_of_the_file_are_refused(tmp_path: Path) -> None:
    dataset().save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    sizes = np.cumsum([0, *(len(image(row)) for row in range(COUNT))]).astype(np.int32)
    content = file.read_bytes()
    assert content.count(sizes.tobytes()) == 1
    for broken in (sizes[::-1], np.where(sizes == sizes[-1], 2**30, sizes), sizes - 1):
        file.write_bytes(content.replace(sizes.tobytes(), broken.astype(np.int32).tobytes()))
        assert "not a complete arrow file" in error_of(tmp_path / "set", None)


def test_compressed_arrow_file_is_refused(tmp_path: Path) -> None:
    dataset().save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    rewrite(file, lambda table: table, compression="lz4")
    assert "compressed; load the set and save it again" in error_of(tmp_path / "set", None)


@pytest.mark.parametrize("name", ["../other/data.arrow", "/etc/passwd", ""])
def test_files_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    dataset().save_to_disk(tmp_path / "set")
    state = json.loads((tmp_path / "set/state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (tmp_path / "set/state.json").write_text(json.dumps(state))
    assert "names a file elsewhere" in error_of(tmp_path / "set", None)


@pytest.mark.parametrize("content", ["{", "[]", '{"_data_files": 3}', "\xff"])
def test_damaged_state_is_refused(tmp_path: Path, content: str) -> None:
    dataset().save_to_disk(tmp_path)
    (tmp_path / "state.json").write_text(content, encoding="latin1")
    with pytest.raises(DataError, match=r"save_to_disk$"):
        read(tmp_path, None)


def test_code_next_to_the_data_is_not_executed(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    dataset().to_parquet(folder / "train.parquet")
    witness = tmp_path / "executed"
    (folder / "set.py").write_text(f"open({str(witness)!r}, 'w')\n")
    assert "scripts are no longer supported" in error_of(folder)
    assert not witness.exists()


def test_missing_package_is_one_line(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = error_of_package(saved)
    assert message.startswith("format huggingface needs the package datasets")
    assert message.endswith("pip install 'dive_fast[datasets]'")


def error_of_package(path: Path) -> str:
    with pytest.raises(DataError) as error:
        huggingface.open_huggingface(str(path), Columns(), "train", has_texts=False)
    return str(error.value)
