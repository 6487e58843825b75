"""docs/use_the_model.md: its code runs, in order, on a run folder; ONNX Runtime and the hub's cache included."""

import ast
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers_models as foreign
from huggingface_hub import HfApi, constants

from dive_fast.commands.console import main
from dive_fast.config.schema import ModelConfig
from dive_fast.model import export_onnx, towers

PAGE = Path(__file__).parents[2] / "docs/use_the_model.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    """(language, code) of the page, in order."""
    return BLOCK.findall(PAGE.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a photo and with the model of a run in runs/mine."""
    folder = tmp_path_factory.mktemp("user")
    model = towers.create(ModelConfig(name=tiny.write_model(folder / "start", tiny.QUICKGELU)))
    (folder / "runs/mine").mkdir(parents=True)
    towers.save_description(model, folder / "runs/mine")
    towers.save(model.export(model.state_dict()), folder / "runs/mine/model.safetensors")
    (folder / "photo.jpg").write_bytes(tiny.jpeg(1, size=(64, 64)))
    return folder


class CopyToCache:
    """The three calls of the page to the hub, as copies into its cache."""

    def __init__(self, root: Path) -> None:
        self.root, self.stage = root, root / "stage"

    def create_repo(self, _: HfApi, repo_id: str, exist_ok: bool) -> None:
        self.stage.mkdir(parents=True)

    def upload_folder(
        self, _: HfApi, repo_id: str, folder_path: str, allow_patterns: list[str] | None = None
    ) -> None:
        for pattern in allow_patterns or ["*"]:
            for path in Path(folder_path).glob(pattern):
                shutil.copy(path, self.stage)
        foreign.put_into_cache(self.stage, self.root, repo_id)

    def upload_file(self, _: HfApi, repo_id: str, path_or_fileobj: str, path_in_repo: str) -> None:
        shutil.copy(path_or_fileobj, self.stage / path_in_repo)
        foreign.put_into_cache(self.stage, self.root, repo_id)


def test_every_block_of_the_page_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    copies = CopyToCache(folder / "hub")
    for name in ("create_repo", "upload_folder", "upload_file"):
        method = getattr(copies, name)
        monkeypatch.setattr(HfApi, name, lambda *arguments, method=method, **named: method(*arguments, **named))
    printed: dict[str, str] = {}
    for language, code in blocks():
        if language == "bash":
            command, *arguments = shlex.split(code)
            assert command == "dive-fast"
            assert main(arguments) == 0, capsys.readouterr().err
        else:
            exec(compile(code, str(PAGE), "exec"), {})
        printed[code] = capsys.readouterr().out
    assert sum(language == "python" for language, _ in blocks()) >= 6
    classified = [ast.literal_eval(text) for code, text in printed.items() if "tiger" in code]
    assert len(classified) == 3
    plain, pipeline, by_onnx = classified
    assert plain == pytest.approx({row["label"]: row["score"] for row in pipeline}, abs=0.02)
    assert plain == pytest.approx(by_onnx, abs=0.02)  # other resizing

    exported = folder / "exported/onnx"
    description = json.loads((exported / export_onnx.DESCRIPTION).read_text())
    assert description["largest_difference"] < 1e-6
    assert (description["opset"], description["left_out"], description["pad_id"]) == (export_onnx.OPSET, [], 0)
    import onnx
    import onnxruntime

    for name, key in (("image", "images"), ("text", "tokens")):
        graph = onnx.load(exported / f"{name}.onnx")
        assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [export_onnx.OPSET]
        assert {node.domain for node in graph.graph.node} <= {""}
        assert graph.graph.input[0].name == key
        assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    model = towers.create(ModelConfig(name=f"local-dir:{folder}/runs/mine")).eval()
    tokens = towers.tokenizer_of(ModelConfig(name=f"local-dir:{folder}/runs/mine"))(
        ["a", "a red cat", "b", "c", "d"]
    )
    session = onnxruntime.InferenceSession(str(exported / "text.onnx"))
    features: Any = session.run(None, {"tokens": tokens.numpy()})[0]
    with torch.no_grad():
        expected = towers.unit(model.encode_text(tokens)).numpy()
    assert np.abs(features - expected).max() < 1e-6


def test_missing_package_for_onnx_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_onnx, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert main(["export", "--to", "onnx", str(folder / "runs/mine"), str(folder / "other")]) == 2
    assert "the export to ONNX needs onnxscript: pip install 'dive_fast[onnx]'" in capsys.readouterr().err
    assert not os.path.exists(folder / "other")
