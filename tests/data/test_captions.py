"""Several captions of an image: how they are read from each format, and which one is drawn."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tiny
import torch

from dive_fast.commands.prepare import main as prepare_main
from dive_fast.config.schema import EvaluationSet, ReferenceConfig
from dive_fast.data.captions import caption_counts, remark_on_captions
from dive_fast.data.loaders.loader import Options, batches_of, training_batches
from dive_fast.data.open_dataset import open_reference
from dive_fast.data.sampler import Order
from dive_fast.data.samples import ReferenceSamples
from dive_fast.data.sources.captioned_folder import open_captioned_folder
from dive_fast.data.sources.sample_table import split_lines
from dive_fast.data.sources.source import Source
from dive_fast.data.transforms import Preprocess
from dive_fast.errors import DataError
from dive_fast.evaluation.datasets.resolve import open_evaluation
from dive_fast.evaluation.geometry.embed import describe_pairs

PREPROCESS = Preprocess((16, 16), (0.5,) * 3, (0.3,) * 3, "bicubic", "shortest")
COUNT, SEED = 9, 7
TEXTS = [[f"caption {row}", f"{row} again", f"and {row}"][: 1 + row % 3] for row in range(COUNT)]
"""One to three captions of each image."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return open_clip.get_tokenizer("ViT-B-32")


def write_folder(root: Path) -> Path:
    for row, texts in enumerate(TEXTS):
        image = root / f"part {row // 4}" / f"{row}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(tiny.jpeg(row))
        image.with_suffix(".txt").write_text("\r\n\n".join(texts) + "\n")
    return root


def write_tars(root: Path) -> Path:
    samples = {
        str(row): {"jpg": tiny.jpeg(row), "txt": " \n".join(texts).encode()} for row, texts in enumerate(TEXTS)
    }
    return tiny.write_tar(root / "a.tar", samples).parent


def write_csv(root: Path) -> Path:
    root.mkdir()
    for row in range(COUNT):
        (root / f"{row}.jpg").write_bytes(tiny.jpeg(row))
    rows = [f"{text}\t{row}.jpg" for row, texts in enumerate(TEXTS) for text in texts]
    (root / "list.csv").write_text("\n".join(["title\tfilepath", *rows]))
    return root / "list.csv"


def prepared(*command: str, output: Path) -> Path:
    assert prepare_main([*command, "--output", str(output), "--workers", "1"]) == 0
    return output


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """Format and path of the same pairs, stored in each way."""
    root = tmp_path_factory.mktemp("captions")
    folder, tars, table = write_folder(root / "folder"), write_tars(root / "tars"), write_csv(root / "csv")
    from_folder = ("--format", "folder", "--text", "txt", "--input", str(folder))
    from_csv = ("--format", "csv", "--input", str(table))
    return {
        "folder": ("folder", folder),
        "webdataset": ("webdataset", tars),
        "csv": ("csv", table),
        "prepared lines": ("prepared", prepared(*from_folder, output=root / "lines")),
        "prepared texts": ("prepared", prepared(*from_csv, output=root / "texts")),
    }


FORMATS = ["folder", "webdataset", "csv", "prepared lines", "prepared texts"]


def open_pairs(described: tuple[str, Path], captions: str = "lines") -> Source:
    kind, path = described
    return open_reference(
        ReferenceConfig.model_validate({"format": kind, "path": str(path), "captions": captions})
    )


def reference(source: Source, tokenizer: Any, draws: bool = True, views: Any = "eval") -> ReferenceSamples:
    return ReferenceSamples(source, tokenizer, PREPROCESS, "argmax", SEED, views, draws)


def captions_of(batch: Any, tokenizer: Any, samples: ReferenceSamples) -> list[str]:
    """The captions in a batch, by their tokens."""
    texts = {text for sample in samples.source.samples for text in sample.texts}
    by_tokens = {tuple(tokenizer([text])[0].tolist()): text for text in texts}
    return [by_tokens[tuple(row.tolist())] for row in batch.text.tokens[batch.text.index]]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_the_same_captions_of_an_image(paths: Any, form: str) -> None:
    source = open_pairs(paths[form])
    assert [list(sample.texts) for sample in source.samples] == TEXTS
    assert [sample.texts for sample in source.samples[2:4]] == [tuple(texts) for texts in TEXTS[2:4]]
    counts = caption_counts(source)
    assert counts is not None
    assert counts.tolist() == [len(texts) for texts in TEXTS]
    assert remark_on_captions(source) == [
        "9 images have 18 captions, 1 to 3 each; one is drawn per image and epoch"
    ]


@pytest.mark.parametrize("form", FORMATS)
def test_one_caption_is_the_default_and_reported_where_there_are_more(
    paths: Any, tokenizer: Any, form: str
) -> None:
    source = open_pairs(paths[form], "one")
    assert caption_counts(source) is None
    if form == "csv":  # every row is a pair
        assert [sample.texts for sample in source.samples] == [(text,) for texts in TEXTS for text in texts]
        assert remark_on_captions(source) == []
        return
    (remark,) = remark_on_captions(source)
    several = form == "prepared texts"
    assert remark.startswith("6 of 9 images have several captions" if several else "6 of 9 captions have several")
    assert "captions=lines" in remark
    samples = reference(source, tokenizer)
    (batch,) = batches_of(samples, [(3, row) for row in range(COUNT)], COUNT, Options())
    assert batch.caption is None
    whole = [sample.texts[0] for sample in source.samples]
    assert [text.split() for text in whole] == [
        (texts[0] if several else " ".join(texts)).split() for texts in TEXTS
    ]
    assert torch.equal(batch.text.tokens[batch.text.index], tokenizer(whole))


def test_lines_are_those_of_text_files() -> None:
    assert split_lines(["a\nb", "c"]) == ("a", "b", "c")
    assert split_lines(["a\r\n\r\n b \rc\n"]) == ("a", "b", "c")
    assert split_lines(["one \x0b line"]) == ("one \x0b line",)
    assert split_lines([" single line \n"]) == (" single line \n",)  # as it is without captions=lines


def test_caption_is_drawn_by_sample_and_epoch(paths: Any, tokenizer: Any) -> None:
    samples = reference(open_pairs(paths["folder"]), tokenizer)
    keys = [(epoch, row) for epoch in range(60) for row in range(COUNT)]
    (batch,) = batches_of(samples, keys, len(keys), Options())
    drawn = captions_of(batch, tokenizer, samples)
    assert [TEXTS[row][caption] for (_, row), caption in zip(keys, batch.caption.tolist(), strict=True)] == drawn
    for row, texts in enumerate(TEXTS):
        counts = Counter(text for (_, other), text in zip(keys, drawn, strict=True) if other == row)
        assert counts.keys() == set(texts)
        assert min(counts.values()) > 60 / len(texts) / 3
    # Images of equal numbers of captions draw apart.
    sequences = {tuple(batch.caption[row::COUNT].tolist()) for row in (2, 5, 8)}
    assert len(sequences) == 3


def test_captions_do_not_depend_on_workers_resumes_ranks_or_loaders(paths: Any, tokenizer: Any) -> None:
    samples = reference(open_pairs(paths["webdataset"]), tokenizer, views=2)

    def batches(steps: range, workers: int = 0, rank: int = 0, ranks: int = 1, loader: Any = "plain") -> Any:
        order = Order(COUNT, 4, rank, ranks, SEED)
        loaded = training_batches(samples, order, steps, Options(loader, workers))
        return [captions_of(batch, tokenizer, samples) for batch in loaded]

    full = batches(range(7))
    assert batches(range(7), workers=2) == full
    assert batches(range(3, 7)) == full[3:]
    assert batches(range(7), loader="dali") == full
    shares = zip(batches(range(7), rank=0, ranks=2), batches(range(7), rank=1, ranks=2), strict=True)
    assert [one + other for one, other in shares] == full


def test_all_captions_of_a_batch_follow_their_images(paths: Any, tokenizer: Any) -> None:
    samples = reference(open_pairs(paths["folder"]), tokenizer)
    (batch,) = batches_of(samples.with_all_captions(), [(0, 5), (0, 3), (0, 4)], 3, Options())
    assert captions_of(batch, tokenizer, samples) == [*TEXTS[5], *TEXTS[3], *TEXTS[4]]
    assert len(batch.images) == 3


def test_retrieval_reads_sidecar_files(paths: Any) -> None:
    section = {"format": "folder", "path": str(paths["folder"][1]), "task": "retrieval"}
    captioned: Any = open_evaluation(EvaluationSet.model_validate(section))
    assert [list(captions) for captions in captioned.captions()] == TEXTS


def test_format_of_pairs_is_guessed(paths: Any) -> None:
    for form in ("folder", "webdataset", "csv", "prepared lines"):
        kind, path = paths[form]
        assert describe_pairs(None, str(path)).format == kind


# Folders


def test_captioned_folder_counts_images_without_usable_text(tmp_path: Path) -> None:
    write_folder(tmp_path)
    first, second, third = (tmp_path / f"part 0/{row}.txt" for row in range(3))
    first.unlink()
    second.write_bytes(b"\xff\xfe\xff")
    third.write_text(" \n")
    (tmp_path / "root.PNG").write_bytes(tiny.jpeg(50, kind="PNG"))
    (tmp_path / "root.txt").write_text("\ufeffat the root")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/x.jpg").write_bytes(tiny.jpeg(0))
    (tmp_path / "a.heic").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("not a caption")
    source = open_captioned_folder(str(tmp_path))
    assert {entry.key: entry.reason for entry in source.skipped} == {
        "part 0/0.jpg": "no .txt of the same name",
        "part 0/1.jpg": "its caption is not UTF-8",
        "part 0/2.jpg": "its caption is empty",
        "a.heic": "images of suffix .heic are not read",
    }
    assert [entry.key for entry in source.ignored] == [".hidden"]
    assert {sample.key: sample.texts[0] for sample in source.samples}["root.PNG"] == "at the root"
    assert [sample.key for sample in source.samples][-1] == "root.PNG"
    assert len(source) == COUNT - 3 + 1
    before = source.digest()
    (tmp_path / "root.txt").write_text("another text")
    assert open_captioned_folder(str(tmp_path)).digest() != before


def test_captioned_folder_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing: expected a folder of images .* but no such folder$"):
        open_captioned_folder(str(tmp_path / "nothing"))
    (tmp_path / "a.jpg").write_bytes(tiny.jpeg(0))
    with pytest.raises(DataError, match=r"no image has a \.txt of the same name next to it \(1 no \.txt"):
        open_captioned_folder(str(tmp_path))
    (tmp_path / "a.jpg").unlink()
    write_tars(tmp_path)
    with pytest.raises(DataError, match=r"it holds tars: use format webdataset$"):
        open_captioned_folder(str(tmp_path))


def test_digest_covers_all_captions_but_not_how_single_ones_are_read(tmp_path: Path) -> None:
    write_folder(tmp_path)
    described = "folder", tmp_path
    assert open_pairs(described).digest() != open_pairs(described, "one").digest()
    for text in tmp_path.rglob("*.txt"):
        text.write_text(f"{text.stem} in one line")
    single = open_pairs(described)
    assert caption_counts(single) is None
    assert remark_on_captions(single) == ["captions = lines, but every image has a single caption"]
    assert single.digest() == open_pairs(described, "one").digest()
    assert np.asarray(single.image_ids()).tolist() == list(range(COUNT))
