"""The evaluator measures a set again if anything that determines its metrics has changed, and only then."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from dive_fast.checkpoint.load_weights import load_into
from dive_fast.config.schema import EvaluateConfig, ModelConfig
from dive_fast.data import content_hashes
from dive_fast.data.sources import node_index, watched
from dive_fast.distributed import Ranks
from dive_fast.errors import ChangedDataError
from dive_fast.evaluation.evaluator import Options, measure_all, open_all
from dive_fast.evaluation.feature_identity import structure
from dive_fast.evaluation.results import Results
from dive_fast.model.head import Head
from dive_fast.model.towers import create, tokenizer_of

ALONE = Ranks(0, 1, torch.device("cpu"))
COUNT = 6


def bmp(seed: int) -> bytes:
    """An image in a format whose file size depends on the image size only."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


class Case:
    """A model, a set and a results folder, of which a test changes one aspect."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config: dict[str, Any] = tiny.CLIP
        self.preprocess: dict[str, Any] = {"size": 32}
        self.set: dict[str, Any] = {
            "format": "folder",
            "path": str(root / "set"),
            "class_names": str(root / "names.txt"),
            "templates": str(root / "templates.txt"),
        }
        self.head: Head | None = Head(torch.eye(3, 24), torch.zeros(3), ("cat", "dog", "owl"))
        self.batch_size = 4
        self.precision = "fp32"
        # Not in the folder of the model, whose description would reject another model.
        self.weights = root / "weights.safetensors"
        if self.weights.is_file():
            return
        for i in range(COUNT):
            self.put(f"{'abc'[i % 3]}/{i}.bmp", bmp(i))
        (root / "names.txt").write_text("cat\ndog\nowl\n")
        (root / "templates.txt").write_text("a photo of a {}\n")
        self.write_weights(seed=0)

    def write_weights(self, seed: int) -> None:
        tiny.write_model(self.root / "model", seed=seed)
        shutil.move(self.root / "model/open_clip_model.safetensors", self.weights)

    def put(self, name: str, content: bytes) -> None:
        path = self.root / "set" / name
        old = path.stat() if path.exists() else None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if old is not None:  # some tools preserve the modification time
            os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))

    def images(self) -> int:
        """Evaluates the set; returns the number of encoded images, which is 0 if a stored result is reused."""
        folder = self.root / f"model {len(list(self.root.iterdir()))}"
        folder.mkdir()
        described = {"model_cfg": self.config, "preprocess_cfg": self.preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(described))
        model = ModelConfig(name=f"local-dir:{folder}")
        towers = load_into(create(model, weights=False), model, self.weights).eval()
        batch_sizes: list[int] = []
        towers.visual.register_forward_hook(lambda _, arguments, __: batch_sizes.append(len(arguments[0])))
        config = EvaluateConfig.model_validate_json(json.dumps({"sets": {"set": self.set}}))
        options = Options("mine", self.precision, self.batch_size, 0)
        results, opened = Results(self.root / "out"), open_all(config.sets, ALONE)
        measure_all(*(towers, tokenizer_of(model), config.sets, opened, ALONE, results, options, {}, self.head))
        return sum(batch_sizes)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A case that has been measured."""
    case = Case(tmp_path_factory.mktemp("measured"))
    assert case.images() == COUNT
    return case.root


@pytest.fixture
def case(measured: Path, tmp_path: Path) -> Case:
    """A copy of the measured case in another folder, with the modification times of its files."""
    shutil.copytree(measured, tmp_path, dirs_exist_ok=True)
    return Case(tmp_path)


def pixels(case: Case) -> None:
    case.put("a/0.bmp", bmp(99))


def one_pixel(case: Case) -> None:
    content = bytearray((case.root / "set/c/5.bmp").read_bytes())
    content[-1] ^= 1
    case.put("c/5.bmp", bytes(content))


def swapped(case: Case) -> None:
    case.put("a/0.bmp", bmp(1))
    case.put("b/1.bmp", bmp(0))


def another_path(case: Case) -> None:
    shutil.copytree(case.root / "set", case.root / "other")
    (case.root / "other/a/0.bmp").write_bytes(bmp(77))
    case.set["path"] = str(case.root / "other")


def touched(case: Case) -> None:
    os.utime(case.root / "set/a/0.bmp", ns=(1, 1))


def labels(case: Case) -> None:
    case.put("b/0.bmp", (case.root / "set/a/0.bmp").read_bytes())
    (case.root / "set/a/0.bmp").unlink()


def names(case: Case) -> None:
    (case.root / "names.txt").write_text("cat\ndog\nbird\n")
    case.head = None


def permuted_names(case: Case) -> None:
    (case.root / "names.txt").write_text("dog\ncat\nowl\n")


def head_row(case: Case) -> None:
    assert case.head is not None
    case.head.weight[1, 0] += 1e-6


def head_bias(case: Case) -> None:
    assert case.head is not None
    case.head.bias[2] = 1


def no_head(case: Case) -> None:
    case.head = None


def activation(case: Case) -> None:
    case.config = tiny.QUICKGELU


def heads_of_attention(case: Case) -> None:
    case.config = tiny.CLIP | {"vision_cfg": tiny.VISION | {"head_width": 8}}


def mean(case: Case) -> None:
    case.preprocess = {"size": 32, "mean": [0.5, 0.5, 0.5]}


def std(case: Case) -> None:
    case.preprocess = {"size": 32, "std": [0.5, 0.5, 0.5]}


def interpolation(case: Case) -> None:
    case.preprocess = {"size": 32, "interpolation": "bilinear"}


def precision(case: Case) -> None:
    case.precision = "bf16"


def tf32(case: Case) -> None:
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32


def on_skipped(case: Case) -> None:
    case.set["on_skipped"] = "report"


def weights(case: Case) -> None:
    case.write_weights(seed=1)


@pytest.mark.parametrize(
    "change",
    [
        *(pixels, one_pixel, swapped, another_path, touched, labels, names, permuted_names, head_row, head_bias),
        *(no_head, activation, heads_of_attention, mean, std, interpolation, precision, tf32, on_skipped, weights),
    ],
    ids=lambda change: change.__name__,
)
def test_evaluator_measures_again_after_change(case: Case, change: Any) -> None:
    tf32_before = torch.backends.cudnn.allow_tf32
    try:
        change(case)
        assert case.images() == len(list(Path(case.set["path"]).rglob("*.bmp")))
        # The new result is stored as well.
        assert case.images() == 0
    finally:
        torch.backends.cudnn.allow_tf32 = tf32_before


def test_evaluator_reuses_no_result_of_a_changed_file_of_a_set_that_is_not_listed_again(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIVE_FAST_CACHE", str(case.root / "cache"))
    monkeypatch.setattr(node_index, "SMALL_FILES", 0)
    monkeypatch.setattr(watched, "RACY_SECONDS", 0.0)
    for probes in (node_index, content_hashes):
        monkeypatch.setattr(probes, "NUM_PROBES", 1)
    case.images()
    assert case.images() == 0
    with (case.root / "set/c/5.bmp").open("r+b") as file:
        file.write(bmp(99))
    with pytest.raises(ChangedDataError, match=r"c/5\.bmp: changed since the data set was listed"):
        case.images()
    assert case.images() == COUNT


def test_templates_matter_only_where_prompts_classify(case: Case) -> None:
    (case.root / "templates.txt").write_text("a rather blurry picture of the {}\n")
    assert case.images() == 0  # the head classifies
    case.head = None
    assert case.images() == COUNT
    (case.root / "templates.txt").write_text("a photo of a {}\n")
    assert case.images() == COUNT
    assert case.images() == 0


def test_evaluator_reuses_results_of_copied_files(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    copy = case.root / "elsewhere.safetensors"
    shutil.copy(case.weights, copy)
    case.weights, case.batch_size = copy, 3
    case.set |= {"metric": "macro_f1", "role": "ood"}
    assert case.images() == 0
    assert "(measured before)" in capsys.readouterr().out
    # A copy of the set with its modification times.
    shutil.copytree(case.root / "set", case.root / "copy")
    case.set["path"] = str(case.root / "copy")
    assert case.images() == 0


def test_evaluator_names_the_changed_key(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    mean(case)
    case.images()
    assert "(measured again: model.preprocess changed)" in capsys.readouterr().out


def test_structure_ignores_weights() -> None:
    torch.manual_seed(0)
    first, second = (torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3)) for _ in range(2))
    assert structure(first) == structure(second)
    second[1].eps = 1e-6  # type: ignore[assignment]
    assert structure(first) != structure(second)
    assert structure(torch.nn.Sequential(torch.nn.GELU())) != structure(torch.nn.Sequential(torch.nn.GELU("tanh")))
