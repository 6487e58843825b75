"""Evaluation of real photos by every loader."""

from pathlib import Path

import open_clip
import pytest
import tiny
import torch
from torch import Tensor

from dive_fast.config.schema import Loader, ModelConfig
from dive_fast.data.loaders.loader import Options
from dive_fast.data.prepared import convert
from dive_fast.data.prepared.raw import RawSource
from dive_fast.data.prepared.read import open_prepared
from dive_fast.data.prepared.write import prepare
from dive_fast.data.samples import EvaluationSamples
from dive_fast.data.sources.webdataset import open_webdataset
from dive_fast.distributed import Ranks
from dive_fast.evaluation.classifier import Classifier
from dive_fast.evaluation.zero_shot import predict
from dive_fast.model import towers

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.realdata
def test_loaders_predict_the_same_classes(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loader in ("nvidia.dali", "ffcv"):
        pytest.importorskip(loader)
    raw = open_webdataset(str(real_data / "imagenet_samples/imagenet_samples.tar"), ".cls", strict=False)
    conversion = convert.Options(container="beton", shard_samples=500, max_side=128)
    prepare(RawSource(raw), tmp_path / "set", conversion, workers=1)
    vision = {"image_size": 64, "layers": 3, "width": 96, "head_width": 32, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    name = tiny.write_model(tmp_path / "model", {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text})
    model = towers.create(ModelConfig(name=name)).eval()
    samples = EvaluationSamples(open_prepared(str(tmp_path / "set"), ".cls"), model.preprocess)
    classes = torch.randn(len(open_clip.IMAGENET_CLASSNAMES), 64, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    logits = Classifier.logits

    def recorded(classes: Classifier, features: Tensor) -> Tensor:
        seen.append(logits(classes, features))
        return seen[-1]

    monkeypatch.setattr(Classifier, "logits", recorded)
    predicted, margins = {}, {}
    loaders: tuple[Loader, ...] = ("plain", "dali", "ffcv")
    for loader in loaders:
        seen.clear()
        predictions, _ = predict(model, Classifier("prompts", classes), samples, ALONE, 200, Options(loader))
        assert predictions.label.tolist() == samples.source.samples.labels.tolist()
        predicted[loader], best = predictions.predicted, torch.cat(seen).topk(2).values
        margins[loader] = best[:, 0] - best[:, 1]
    assert len(predicted["plain"].unique()) > 5
    for loader in loaders[1:]:
        differs = predicted[loader] != predicted["plain"]
        # Their pixels differ by rounding, which decides between classes that are about equal.
        assert differs.float().mean() < 0.05
        assert bool((margins["plain"][differs] < margins["plain"].median() / 4).all())
