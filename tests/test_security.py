"""Malicious files through the real readers: one clear line, and nothing is executed or written."""

import csv
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from dive_fast.checkpoint.load_weights import load_into
from dive_fast.config.schema import ModelConfig
from dive_fast.data.decode import decode
from dive_fast.data.prepared.convert import Options
from dive_fast.data.prepared.format import MANIFEST
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.read import open_prepared, verify
from dive_fast.data.prepared.write import prepare
from dive_fast.data.prompt_files import read_class_names
from dive_fast.data.sources.csv_table import open_csv
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.distributed import Ranks
from dive_fast.engine.deepspeed_config import deepspeed_section
from dive_fast.errors import MAX_LENGTH, ConfigError, DataError
from dive_fast.evaluation import results
from dive_fast.evaluation.datasets import imagenet, layouts, wilds
from dive_fast.io.atomic_files import write_atomic
from dive_fast.methods.run_config import load_run_config
from dive_fast.model import head as heads
from dive_fast.model import towers
from dive_fast.teacher import cache_files as store
from dive_fast.teacher import clip_retrieval as retrieval
from dive_fast.teacher import write_cache as write
from dive_fast.teacher.cache_files import StaleCacheError

ROOT = Path(__file__).parents[1]
ALONE = Ranks(0, 1, torch.device("cpu"))
LAYOUT = store.Layout(5, 1, 4, "float32")
DEEP = "[" * 100_000


class Harmful:
    """An object whose unpickling creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with model and data, a prepared set and a teacher cache, all valid."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "config.json").write_text(json.dumps(tiny.write_config(folder)))
    raw = RawSource(open_webdataset(str(folder / "target"), ".cls"))
    prepare(raw, folder / "set", Options(), 1)
    write_cache(folder / "cache")
    return folder


def write_cache(folder: Path) -> Path:
    store.create(folder, LAYOUT, {"of": "tests"})
    writer = store.Writer(folder, LAYOUT, 0)
    writer.write(0, {half: np.eye(5, 4, dtype=np.float32) for half in store.HALVES})
    writer.close()
    store.seal(folder, LAYOUT)
    return folder


@pytest.fixture
def world(prepared: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy for malicious files, which must not create their marker."""
    folder = tmp_path / "world"
    shutil.copytree(prepared, folder)
    yield folder
    assert not (tmp_path / "marker").exists()


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def refused(read: Callable[[], Any], *words: str) -> str:
    """The one-line message of a reader, which contains these words."""
    with pytest.raises((ConfigError, DataError)) as caught:
        read()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= MAX_LENGTH + 5
    for word in words:
        assert word in message
    return message


def command(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """The error line of a command, which exits with code 2."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("dive_fast.distributed.join", lambda *_: ALONE)
    module = import_module(f"dive_fast.commands.{name}")
    assert module.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return str(line)


# Files that would execute code


def bombs(folder: Path, marker: Path) -> list[Path]:
    """Checkpoints of every kind that execute code where pickle is trusted."""
    folder.mkdir()
    harmful = Harmful(marker)
    torch.save({"state_dict": {"logit_scale": harmful}}, folder / "zip.pt")
    torch.save(harmful, folder / "old.bin", _use_new_zipfile_serialization=False)
    (folder / "plain.pth").write_bytes(pickle.dumps(harmful))
    (folder / "called.safetensors").write_bytes(pickle.dumps(harmful))
    np.savez(folder / "big_vision.npz", **{"params/img/embedding/kernel": np.array([harmful], dtype=object)})
    np.save(folder / "array.npy", np.array([harmful], dtype=object))
    for name in ("below_zero3", "zero3"):
        (folder / name).mkdir()
    torch.save({"module": harmful}, folder / "below_zero3/mp_rank_00_model_states.pt")
    for name in ("model", "optim"):
        torch.save(harmful, folder / f"zero3/zero_pp_rank_0_mp_rank_00_{name}_states.pt")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("trusting", [False, True])
def test_weights_execute_nothing(
    world: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusting: bool
) -> None:
    if trusting:  # a user may have set it for another tool
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    model = ModelConfig(name=f"local-dir:{world / 'model'}")
    built = towers.create(model, weights=False)
    for path in bombs(tmp_path / "bombs", marker):
        refused(lambda path=path: load_into(built, model, path), str(path))
        if path.is_file():
            named = ModelConfig(name="ViT-B-32", pretrained=str(path))
            if path.suffix == ".pt":  # building so large a model takes a second
                refused(lambda named=named: towers.create(named), "model: cannot load ViT-B-32")
        assert not marker.exists()
    # The same file in the folder of the model.
    (world / "model/open_clip_model.safetensors").unlink()
    shutil.copy(tmp_path / "bombs/zip.pt", world / "model/open_clip_pytorch_model.bin")
    refused(lambda: towers.create(model), "model: cannot load local-dir:")


def test_trusted_pickle_would_create_the_marker(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Harmful(tmp_path / "marker")))
    assert (tmp_path / "marker").is_dir()


def test_commands_execute_nothing_in_weights(
    world: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {path.name: path for path in bombs(tmp_path / "bombs", marker)}
    config = ["--config", str(world / "config.json"), f"train.output={world / 'run'}"]
    target = json.loads((world / "config.json").read_text())["data"]["target"]
    sets = {"val": {key: target[key] for key in tiny.EVALUATION}}
    config += [f"evaluate={json.dumps({'sets': sets, 'workers': 0})}", f"model.name=local-dir:{world / 'model'}"]
    for name in ("zip.pt", "zero3", "called.safetensors"):
        assert str(paths[name]) in command(
            "evaluate", [*config, "--weights", str(paths[name])], monkeypatch, capsys
        )
    assert str(paths["zip.pt"]) in command(
        "ensemble", [*config, "--weights", str(paths["zip.pt"])], monkeypatch, capsys
    )
    assert str(paths["old.bin"]) in command(
        "geometry", [*config, "--after", str(paths["old.bin"])], monkeypatch, capsys
    )
    (world / "model/open_clip_model.safetensors").unlink()
    shutil.copy(paths["plain.pth"], world / "model/open_clip_pytorch_model.bin")
    for name in ("train", "cache"):
        assert "model: cannot load local-dir:" in command(name, config, monkeypatch, capsys)


@pytest.mark.parametrize("trusted", [True, False])
def test_model_executes_no_code_of_its_own(
    world: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # a question at the terminal must not matter
    folder = world / "model"
    tree = json.loads((folder / "open_clip_config.json").read_text())
    kwargs = {"trust_remote_code": True} if trusted else {}
    tree["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "any", "tokenizer_kwargs": kwargs}
    (folder / "open_clip_config.json").write_text(json.dumps(tree))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n")
    automatic = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": automatic}))
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": automatic}))
    model = ModelConfig(name=f"local-dir:{folder}")
    message = refused(lambda: towers.tokenizer_of(model), "model.name: cannot load the tokenizer of local-dir:")
    assert not trusted or "the model needs its own code, which is not executed" in message
    raw = RawSource(open_webdataset(str(world / "target"), ".cls"))
    refused(
        lambda: prepare(raw, world / "new", Options(tokenizer=model.name), 1), "--tokenizer local-dir:", "load it"
    )
    # A Hugging Face text tower.
    tree["model_cfg"]["text_cfg"] = {"hf_model_name": str(folder), "context_length": 8}
    (folder / "open_clip_config.json").write_text(json.dumps(tree))
    refused(lambda: towers.create(model), "model: cannot load local-dir:")
    assert not (tmp_path / "modules").exists()
    assert not (world / "new").exists()


def test_config_cannot_name_code(world: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (world / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(str(world))
    path = str(world / "config.json")
    refused(lambda: load_run_config(path, ["data.target.loader=evil"]), 'data.target.loader = "evil"')
    # DeepSpeed imports these names.
    section = {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["evil.Evil"]}}
    config = load_run_config(path, [f"deepspeed={json.dumps(section)}"])
    refused(lambda: deepspeed_section(config, 1), "deepspeed.torch_autocast belongs to train.precision")
    assert "evil" not in sys.modules


def test_postscript_runs_no_program(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 36\n%%EndComments\n(x) (w) file closefile\n%%EOF\n"

    def ghostscript(*_: Any, **__: Any) -> None:
        raise AssertionError("PIL runs Ghostscript")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", ghostscript)
    with pytest.raises(OSError, match="cannot identify image file"):
        decode(script)
    tiny.write_tar(world / "ps.tar", {"0": {"jpg": script, "cls": b"1"}})
    refused(lambda: open_webdataset(str(world / "ps.tar"), ".cls").image(0), "cannot decode the image")
    for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"):
        assert decode(tiny.jpeg(0, kind=kind)).size == (40, 36)


def test_arrays_of_objects_are_refused(world: Path, marker: Path, tmp_path: Path) -> None:
    objects = np.array([Harmful(marker)] * 5, dtype=object)
    for name in ("image.npy", "text.npy", "checksums.npy"):
        for write_bomb in (
            lambda path: np.save(path, objects),
            lambda path: path.write_bytes(pickle.dumps(objects)),
            lambda path: np.savez(path.open("wb"), objects),
        ):
            cache = shutil.copytree(world / "cache", tmp_path / "bomb")
            write_bomb(cache / name)
            message = refused(lambda cache=cache: store.Store(cache), f"{cache}", name, "rebuild it")
            assert "a file is damaged" in message
            assert not marker.exists()
            shutil.rmtree(cache)
    (tmp_path / "theirs").mkdir()
    for name in ("img_emb", "text_emb"):
        np.save(tmp_path / f"theirs/{name}_0.npy", objects)
    (tmp_path / "theirs/metadata_0.parquet").write_bytes(pickle.dumps(objects))
    refused(
        lambda: retrieval.Embeddings(tmp_path / "theirs", "float32"), "img_emb_0.npy: cannot read it", "copy it"
    )


def test_torchvision_sets_with_pickles_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--format",
        "torchvision",
        "--name",
        "LSUN",
        "--input",
        str(tmp_path),
        "--output",
        str(tmp_path / "s"),
    ]
    assert "with a pickle stored next to the data" in command("prepare", arguments, monkeypatch, capsys)


# Names and links that lead out of a folder


OUTSIDE = ["/etc/passwd", "../secret.tar", "a/../../secret.tar", "", ".", "x\0y", "..", "//x"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_prepared_set_cannot_name_files_outside(world: Path, name: str) -> None:
    (world / "secret.tar").write_bytes(b"secret")
    path = world / "set" / MANIFEST
    tree = json.loads(path.read_text())
    tree["files"][0] |= {"name": name, "bytes": 6}
    path.write_text(json.dumps(tree))
    for read in (open_prepared, lambda folder, _: verify(folder)):
        message = refused(lambda read=read: read(str(world / "set"), ".cls"), str(path), "copy the set again")
        assert "is not the name of a file below" in message


def test_links_out_of_a_folder_are_refused(world: Path, tmp_path: Path) -> None:
    folder = world / "set"
    tar = next(folder.glob("*.tar"))
    tar.rename(tmp_path / "secret.tar")
    tar.symlink_to(tmp_path / "secret.tar")
    refused(lambda: open_prepared(str(folder), ".cls"), f"{tar} is a link out of its folder")
    tar.unlink()
    tar.symlink_to(tar)
    refused(lambda: open_prepared(str(folder), ".cls"), f"{tar} cannot be resolved")
    tar.unlink()
    # A link inside is as good as a file.
    (tmp_path / "secret.tar").rename(folder / "there")
    tar.symlink_to("there")
    assert len(open_prepared(str(folder), ".cls")) == 24
    (folder / "index.safetensors").rename(tmp_path / "index")
    (folder / "index.safetensors").symlink_to(tmp_path / "index")
    refused(lambda: open_prepared(str(folder), ".cls"), "index.safetensors: cannot read it", "is a link out")
    for name in ("image.npy", "checksums.npy", "cache.json"):
        (world / "cache" / name).rename(tmp_path / name)
        (world / "cache" / name).symlink_to(tmp_path / name)
        refused(lambda: store.Store(world / "cache"), name, "is a link out of its folder", "rebuild it")
        (world / "cache" / name).unlink()
        (tmp_path / name).rename(world / "cache" / name)
    assert store.Store(world / "cache").layout == LAYOUT


@pytest.mark.parametrize("name", ["image.npy", "text.npy", "journal-0"])
def test_unfinished_cache_is_not_written_through_a_link(world: Path, tmp_path: Path, name: str) -> None:
    """As it comes in a run folder that somebody asks to be continued."""
    store.create(partial := world / ".teacher.partial", LAYOUT, {"of": "tests"})
    if (partial / name).exists():
        (partial / name).rename(tmp_path / "mine")
    else:
        (tmp_path / "mine").write_bytes(b"mine")
    before = (tmp_path / "mine").read_bytes()
    (partial / name).symlink_to(tmp_path / "mine")
    assert write.begin(partial, LAYOUT, {"of": "tests"}, store.COMPUTED, ALONE) == [0]
    refused(
        lambda: store.Writer(partial, LAYOUT, 0), f"{partial / name} is a link out of its folder", "rebuild it"
    )
    assert (tmp_path / "mine").read_bytes() == before
    # A new cache replaces the link and not its target.
    store.create(partial, LAYOUT, {"of": "tests"})
    assert (tmp_path / "mine").read_bytes() == before
    assert name == "journal-0" or not (partial / name).is_symlink()


def test_unfinished_cache_of_other_sizes_is_not_resumed(world: Path) -> None:
    store.create(partial := world / ".teacher.partial", LAYOUT, {"of": "tests"})
    larger = store.Layout(5000, 1, 4, "float32")
    refused(lambda: write.begin(partial, larger, {"of": "tests"}, store.COMPUTED, ALONE), "rebuild it")
    refused(lambda: store.Writer(partial, larger, 0), "is not the array of cache.json")


def test_writers_do_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    written: dict[str, Callable[[Path], None]] = {
        "report.json": lambda path: write_atomic(path, b"{}"),
        "model.safetensors": lambda path: towers.save({"x": torch.zeros(2)}, path),
        "head.safetensors": lambda path: heads.save(heads.Head(torch.zeros(1, 2), torch.zeros(1), ("a",)), path),
    }
    for name, make in written.items():
        for link in (f".partial-{name}", name):
            (tmp_path / link).symlink_to(tmp_path / "mine")
        make(tmp_path / name)
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_evaluation_lists_cannot_name_files_outside(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(tiny.jpeg(0))
    root = tmp_path / "root"
    root.mkdir()
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "a\0b"):
        (root / "split.json").write_text(json.dumps({"test": [[name, 0, "cat"]]}))
        refused(lambda: layouts.coop(root, "split.json", [""]), "names a file elsewhere", "get the data set again")
        tree = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "a"}]}
        (root / "coco_test_karpathy.json").write_text(json.dumps(tree))
        refused(lambda: layouts.karpathy(root, "mscoco"), "names a file elsewhere")
        if "\0" in name:
            continue
        with (root / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["split", "y", "filename"], ["test", "0", name]])
        refused(lambda: wilds.open_iwildcam(root, "test"), "names a file elsewhere")
    (root / "images_variant_test.txt").write_text("../../secret A\n")
    (root / "variants.txt").write_text("A\n")
    refused(lambda: layouts.aircraft(root), "names a file elsewhere")
    (root / "annotations").mkdir()
    (root / "annotations/test.txt").write_text("../../secret 1 1 1\n")
    refused(lambda: layouts.pets(root), "names a file elsewhere")


def test_tar_members_are_not_used_as_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/a.tar", "w") as tar:
        for name in ("../../x", "/abs/y", "..", "fine"):
            for suffix, data in (("jpg", tiny.jpeg(0)), ("cls", b"1")):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            for suffix in ("jpg", "cls"):
                member = tarfile.TarInfo(f"link{kind.decode()}.{suffix}")
                member.type, member.linkname = kind, "/etc/passwd"
                tar.addfile(member)
    keys = [sample.key for sample in open_webdataset(str(tmp_path / "in"), ".cls").samples]
    assert keys == ["a.tar/../../x", "a.tar/abs/y", "a.tar/fine"]
    assert not any("link" in key for key in keys)
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    arguments = ["--format", "webdataset", "--input", str(tmp_path / "in"), "--output", str(out), "--workers", "1"]
    assert import_module("dive_fast.commands.prepare").main(arguments) == 0
    assert sorted(path for path in tmp_path.rglob("*") if out not in (path, *path.parents)) == before
    assert {path.parent for path in out.rglob("*")} == {out}
    capsys.readouterr()


# Files that would never end or exhaust the memory


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with a size field of twelve bytes as they are."""
    field = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    field[124:136], field[156:157] = size, kind
    field[148:156] = b" " * 8
    field[148:155] = b"%06o\0" % sum(field)
    return bytes(field)


def base256(number: int) -> bytes:
    lead = 0xFF if number < 0 else 0x80
    return bytes([lead]) + (number % 256**11).to_bytes(11, "big")


def pax(size: str) -> bytes:
    record = f" size={size}\n"
    length = len(record) + len(str(len(record) + 2))
    data = f"{length}{record}".encode()
    return header("p", b"%011o\0" % len(data), b"x") + data.ljust(512, b"\0") + header("a.jpg", b"0" * 11 + b"\0")


TARS = {
    "backwards": header("a.jpg", base256(-1024)),
    "backwards later": header("a.jpg", b"0" * 11 + b"\0") + header("b.jpg", base256(-1024)),
    "backwards by pax": pax("-1536"),
    "huge": header("a.jpg", base256(2**80)),
    "huge name": header("a", base256(2**60), b"L"),
    "huge pax": header("a", base256(2**40), b"x"),
    "names of names": header("a", b"%011o\0" % 0, b"L") * 5000,
    "longer than the file": header("a.jpg", b"%011o\0" % 10_000),
    "sparse": header("a.jpg", b"0" * 11 + b"\0", b"S"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", TARS)
def test_tar_with_invalid_sizes_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.tar").write_bytes(header("0.cls", b"0" * 11 + b"\0") + TARS[kind] + bytes(1024))
    refused(lambda: open_webdataset(str(tmp_path / "a.tar"), ".cls"), f"{tmp_path}/a.tar: ")


def npy(shape: str, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(1024)


HEADERS = ["(10**18, 4)", f"({10**18}, 4)", f"({2**70}, 4)", "(-5, 4)", "(5, 4)" + "[" * 300, "(" * 5000, "None",
           "(" + "1," * 90 + ")", "-" * 9000 + "1", "(5, 4.0)", "{[]: 1}"]  # fmt: skip


@pytest.mark.parametrize("shape", HEADERS)
def test_array_with_invalid_header_is_refused(world: Path, shape: str) -> None:
    for name in ("image.npy", "checksums.npy"):
        cache = shutil.copytree(world / "cache", world / f"lying {name}")
        (cache / name).write_bytes(npy(shape, "<u4" if name == "checksums.npy" else "<f4"))
        refused(lambda cache=cache: store.Store(cache), str(cache), "rebuild it")
    (world / "img_emb_0.npy").write_bytes(npy(shape))
    with pytest.raises(ConfigError, match=r"img_emb_0.npy: cannot read it: "):
        retrieval._map(world / "img_emb_0.npy", "float32")


@pytest.mark.parametrize(
    "layout",
    [
        {"samples": 10**30}, {"samples": -5}, {"samples": 5.0}, {"samples": "5"}, {"samples": True}, {"views": 0},
        {"views": 2**39, "samples": 2**39}, {"width": 10**12}, {"width": None}, {"dtype": "object"}, {"dtype": []},
        {"more": 1}, {"samples": [5]},
    ],
)  # fmt: skip
def test_cache_manifest_with_invalid_sizes_is_refused(world: Path, layout: dict[str, Any]) -> None:
    path = world / "cache/cache.json"
    tree = json.loads(path.read_text())
    tree["layout"] |= layout
    path.write_text(json.dumps(tree))
    refused(lambda: store.Store(world / "cache"), str(world / "cache"), "rebuild it")


def safetensors(tensors: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


SAFETENSORS = {
    "huge header": safetensors({}, length=2**62),
    "longer header": safetensors({}, length=90_000_000),
    "huge shape": safetensors({"weight": entry("F32", [2**40, 2**40], 0, 16)}, bytes(16)),
    "other shape": safetensors({"weight": entry("F32", [100], 0, 16)}, bytes(16)),
    "behind the end": safetensors({"weight": entry("F32", [4], 2**40, 2**40 + 16)}, bytes(16)),
    "overlapping": safetensors({n: entry("F32", [4], 0, 16) for n in ("weight", "bias")}, bytes(16)),
    "backwards": safetensors({"weight": entry("F32", [4], 16, 0)}, bytes(16)),
    "unknown type": safetensors({"weight": entry("OBJECT", [4], 0, 16)}, bytes(16)),
    "deep": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "empty": b"",
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_safetensors_with_invalid_header_are_refused(world: Path, kind: str) -> None:
    for path in (world / "lying.safetensors", world / "set/index.safetensors"):
        path.write_bytes(SAFETENSORS[kind])
    model = ModelConfig(name=f"local-dir:{world / 'model'}")
    refused(lambda: heads.load(world / "lying.safetensors"), "lying.safetensors: cannot be read as a head")
    refused(lambda: towers.read_weights(model, world / "lying.safetensors"), "lying.safetensors: not weights of")
    refused(lambda: open_prepared(str(world / "set"), ".cls"), "index.safetensors: cannot read it", "copy the set")


def _set(name: str, row: int, value: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(index: dict[str, torch.Tensor]) -> None:
        index[name][row] = value

    return change


INDEXES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no such file": (_set("file", 3, 1), "file: a value is out of range"),
    "the last file": (_set("file", 3, -1), "file: a value"),
    "before the file": (_set("offset", 3, -1), "offset: a value"),
    "behind the file": (_set("offset", 3, 2**62), "a sample lies beyond the end of its file"),
    "all of the file": (_set("size", 3, -1), "size: a value"),
    "more than memory": (_set("size", 3, 2**62), "a sample lies beyond the end"),
    "around the end": (_set("offset", 3, 2**63 - 1), "a sample lies beyond the end"),
    "no pixels": (_set("height", 3, 0), "height: a value"),
    "backwards": (_set("key_ends", 3, 0), "key_ends: not increasing"),
    "behind the texts": (_set("key_ends", -1, 2**40), "key_ends: not increasing"),
    "another label": (_set("label", 3, 4), f"labels, texts or hashes do not match {MANIFEST}"),
    "missing": (lambda index: index.pop("size"), "size is missing"),
    "no texts": (lambda index: index.pop("texts"), "texts is missing"),
    "too few": (lambda index: index.update(label=index["label"][:-1]), "label: torch.int64 (23,)"),
    "floats": (lambda index: index.update(offset=index["offset"].double()), "offset: torch.float64"),
    "a number": (lambda index: index.update(offset=torch.tensor(1)), "offset: torch.int64 ()"),
    "tokens": (lambda index: index.update(tokens=torch.zeros(24, 8)), "tokens: torch.float32"),
    "negative tokens": (
        lambda index: index.update(tokens=torch.full((24, 8), -1, dtype=torch.int32)),
        "tokens: a value is negative",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", INDEXES)
def test_index_outside_of_its_files_is_refused(world: Path, kind: str) -> None:
    path = world / "set/index.safetensors"
    change, message = INDEXES[kind]
    index = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(index)
    save_file(index, path)
    refused(lambda: open_prepared(str(world / "set"), ".cls"), f"{path}: {message}", "copy the set again")
    refused(lambda: verify(str(world / "set")), f"{path}: {message}")


def test_name_that_is_not_text_is_refused_when_read(world: Path) -> None:
    path = world / "set/index.safetensors"
    index = {name: tensor.clone() for name, tensor in load_file(path).items()}
    index["keys"][0] = 255
    save_file(index, path)
    refused(
        lambda: open_prepared(str(world / "set"), ".cls").samples[0], f"{world / 'set'}: invalid text in row 0"
    )


def test_deeply_nested_json_is_refused(world: Path, tmp_path: Path) -> None:
    (world / "config.json").write_text(DEEP)
    refused(
        lambda: load_run_config(str(world / "config.json")),
        f"{world}/config.json: not valid JSON: nested more than",
    )
    (world / "config.json").write_text('{"deepspeed": ' + "[" * 100 + "]" * 100 + "}")
    refused(lambda: load_run_config(str(world / "config.json")), "nested more than 64 deep")
    (world / "set" / MANIFEST).write_text(DEEP)
    refused(lambda: open_prepared(str(world / "set"), ".cls"), f"{MANIFEST}: cannot read it: nested too")
    (world / "cache/cache.json").write_text(DEEP)
    refused(lambda: store.Store(world / "cache"), "cache.json: cannot read it: nested too deeply", "rebuild")
    save_file({"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}, tmp_path / "h", {"class_names": DEEP})
    refused(lambda: heads.load(tmp_path / "h"), "cannot be read as a head", "nested too deeply")
    (tmp_path / results.FILE).write_text(DEEP + "\n")
    refused(lambda: results.Results(tmp_path), "line 1 is not a result: nested too deeply; remove it")
    for name in imagenet.MAPPINGS:
        (tmp_path / name).write_text(DEEP)
    refused(lambda: imagenet.open_objectnet(tmp_path, tmp_path), "cannot read ObjectNet's map")
    (tmp_path / "coco_test_karpathy.json").write_text(DEEP)
    refused(lambda: layouts.karpathy(tmp_path, "mscoco"), "cannot read it: nested too deeply")


@pytest.mark.timeout(60)
def test_pipes_are_refused_without_waiting(world: Path) -> None:
    def pipe(path: Path) -> Path:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        return path

    names = pipe(world / "names.txt")
    refused(lambda: read_class_names(str(names)), "names.txt: cannot read class names: not a regular file")
    refused(lambda: load_run_config(str(names)), "no such file")
    (world / "images/a").mkdir(parents=True)
    pipe(world / "images/a/1.jpg")
    refused(lambda: open_folder(str(world / "images")), "1.jpg: named like an image, but not a regular file")
    pipe(next((world / "set").glob("*.tar")))
    refused(lambda: open_prepared(str(world / "set"), ".cls"), "is missing")
    refused(lambda: verify(str(world / "set")), "cannot read it: no such file")
    pipe(world / "set" / MANIFEST)
    refused(lambda: open_prepared(str(world / "set"), ".cls"), "cannot read it: not a regular file")
    pipe(world / "cache/image.npy")
    refused(lambda: store.Store(world / "cache"), "image.npy is missing or not a regular file", "rebuild it")
    pipe(world / "cache/cache.json")
    refused(lambda: store.Store(world / "cache"), "cache.json: cannot read it: not a regular file")


def test_csv_row_without_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(tiny.jpeg(0))
    (tmp_path / "a.csv").write_text("title\tfilepath\none\ta.jpg\ntwo\t\n")
    refused(lambda: open_csv(str(tmp_path / "a.csv"), None, group=False), "row 2 (line 3): invalid file name ''")


# Messages


def test_message_is_one_line_without_control_characters(world: Path) -> None:
    path = world / "cache/cache.json"
    tree = json.loads(path.read_text())
    tree["layout"]["samples"] = 5
    tree["fingerprint"] = {"a\n\x1b[2Jerror: all is well": "x\u202e" * 10_000}
    path.write_text(json.dumps(tree))
    from dive_fast.teacher.teacher import CachedTeacher

    message = refused(lambda: CachedTeacher(world / "cache", {}), "or rebuild it", r"\x1b[2Jerror: all is well")
    assert message.startswith(f"teacher cache {world / 'cache'} belongs to another configuration")
    with pytest.raises(StaleCacheError):
        CachedTeacher(world / "cache", {})
