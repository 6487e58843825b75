"""Runs that learn prompts: few shots, checkpoints and exports of prompts alone, resumes, options."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from test_resume import Folder

from dive_fast import api
from dive_fast.checkpoint.load_weights import load_into
from dive_fast.checkpoint.manifest import Tensors, list_checkpoints
from dive_fast.config.schema import EvaluationSet, ModelConfig
from dive_fast.data.loaders.loader import Options as LoaderOptions
from dive_fast.data.loaders.loader import batches_of
from dive_fast.data.samples import EvaluationSamples
from dive_fast.distributed import Ranks, join
from dive_fast.errors import ConfigError
from dive_fast.evaluation.compatibility import measure_update
from dive_fast.evaluation.datasets.evaluation_set import Labelled
from dive_fast.evaluation.early_checks import find_weights
from dive_fast.evaluation.evaluator import Options, open_all
from dive_fast.evaluation.results import Results
from dive_fast.methods.method import Part
from dive_fast.model import prompt_file
from dive_fast.model.learned_prompts import LearnedPrompts, NameAttention, encode_classes, tokenize_classes
from dive_fast.model.towers import create, tokenizer_of

STEPS, WIDTH = 4, tiny.TEXT["width"]
CONTEXT = 4
SGD = (
    *(("train.optimizer", "sgd"), ("deepspeed.zero_optimization.stage", "auto")),
    *(("train.warmup_steps", 2), ("train.warmup_rate", 1e-5), ("train.cosine_every", "epoch")),
)


def tree_of(folder: Path) -> dict[str, Any]:
    Part.backend = "torch"
    tree = tiny.write_config(folder, max_steps=STEPS, checkpoint_every=1, keep_last=9, epochs=9)
    tree["data"].pop("reference")
    tree["objective"] = {"name": "contcoop", "heads": 4}
    target = tree["data"]["target"]
    target |= {"shots": 4, "classes": "base", "batch_size": 6}
    described = {key: target[key] for key in tiny.EVALUATION}
    sets = {part: described | {"classes": part} for part in ("base", "new")}
    tree["evaluate"] = {"sets": sets, "every_steps": 2, "select": "base"}
    return tree


def one_rank(folder: Path) -> dict[str, Any]:
    ranks, tree = join(), tree_of(folder)
    run = Folder(ranks, tree, folder / "run")
    results: dict[str, Any] = {"run": run.start(*SGD)}
    killed = Folder(ranks, tree, folder / "killed")
    killed.start(*SGD, kill_at=3)
    results["other"] = killed.start(*SGD, ("train.momentum", 0.5))
    (killed.path / "model.safetensors").write_bytes(b"of another run")
    results["resumed"] = killed.start(*SGD)
    results["adamw"] = Folder(ranks, tree, folder / "adamw").start(
        ("objective", {"name": "coop", "context": 3}), ("train.precision", "fp16"), ("train.micro_batch_size", 2)
    )
    new = tiny.write_model(folder / "new", tiny.FEW_TOKENS, seed=3)
    retrained = Folder(ranks, tree, folder / "retrained")
    retrained.start(*SGD, ("model.name", new))
    results["update"] = update_of(folder, ranks, tree, new)
    results["partitioned"] = Folder(ranks, tree, folder / "refused").start(SGD[0])
    return results


def update_of(folder: Path, ranks: Ranks, tree: dict[str, Any], new: str) -> dict[str, Any]:
    """An update measured by the module and again from the stored rows, and its accuracies by plain code."""
    sets = {name: EvaluationSet.model_validate(each) for name, each in tree["evaluate"]["sets"].items()}
    opened = open_all(sets, ranks)
    files = [folder / run / "prompts.safetensors" for run in ("run", "retrained")]
    models = [ModelConfig(name=name) for name in (tree["model"]["name"], new)]
    options, output = Options("", "fp32", 5, 0), Results(folder / "results")
    output.folder.mkdir()

    def measure(*prompts: Path) -> Any:
        return measure_update(*models, *prompts, sets, opened, ranks, output, options)

    rows, update = measure(*files)
    again, repeated = measure(*files)
    plain = {}
    for name, data in opened.items():
        assert isinstance(data, Labelled)
        for model, kind, prompts in ((0, "old", files[0]), (1, "new", files[0]), (1, "retrained", files[1])):
            plain[name, kind] = plain_accuracy(models[model], data, prompts)
    with pytest.raises(ConfigError, match=r"learned with local-dir:.*not with these weights of local-dir:.*new"):
        measure(files[0], files[0])
    other, empty = ModelConfig(name=tiny.write_model(folder / "other")), Results(folder / "unmeasured")
    empty.folder.mkdir()
    with pytest.raises(ConfigError, match="vocabulary size is not that of"):
        measure_update(models[0], other, files[0], None, sets, opened, ranks, empty, options)
    # Refused before the old model is measured.
    assert empty.rows == []
    python = api.evaluate(models[1], sets, prompts=folder / "run", batch_size=5, workers=0)
    with pytest.raises(ConfigError, match=r"prompts .*new: no such file as prompts.safetensors in it"):
        api.evaluate(models[1], sets, prompts=folder / "new")
    return {"rows": rows, "again": again, "update": update, "repeated": repeated, "plain": plain, "python": python}


@torch.no_grad()
def plain_accuracy(model: ModelConfig, data: Labelled, prompts: Path) -> float:
    towers, tokenizer = create(model).eval(), tokenizer_of(model)
    tensors, phrase = load_file(prompts), "a photo of a"
    learned = LearnedPrompts(tensors["context"], phrase, NameAttention(WIDTH, 4))
    learned.load_state_dict(tensors)
    classes = tokenize_classes(tokenizer, towers.pooled_at, data.class_names, phrase)
    rows = encode_classes(towers, learned, classes, range(len(data.class_names)))
    samples = EvaluationSamples(data.source, towers.preprocess)
    batch = next(
        iter(batches_of(samples, [(0, row) for row in range(len(data.source))], 99, LoaderOptions(workers=0)))
    )
    cosines = (
        torch.nn.functional.normalize(towers.encode_image(batch.images)) @ torch.nn.functional.normalize(rows).T
    )
    return float((cosines.argmax(1) == batch.labels).float().mean())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return run_ranks(1, one_rank, folder, init=False, timeout=300)[0]


def stored(run: Path) -> dict[str, Any]:
    """Names and values of the newest checkpoint."""
    tensors, cpu = Tensors(list_checkpoints(run / "checkpoints")[-1]), torch.device("cpu")
    return {
        f"{kind}/{name}": tensors.read(kind, name, cpu)
        for kind in ("weights", "fixed", "momentum_buffer", "exp_avg", "exp_avg_sq")
        for name in tensors.shapes(kind)
    }


def test_run_trains_few_shots_of_base_classes(results: dict[str, Any], folder: Path) -> None:
    printed = results["run"]
    assert "error" not in printed, printed
    assert "prompts: 4 context vectors of width 32, 4,224 parameters, 3 classes" in printed
    assert "12 of 15 images, 4 of each class" in printed
    assert "forgetting probe" not in printed + (folder / "run" / "report.md").read_text()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "cross_entropy" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    # Two steps an epoch: the first one at the constant rate, the second one at the peak.
    assert [line["learning_rate"] for line in steps] == pytest.approx([1e-5, 1e-5, 1e-3, 1e-3])
    assert all(line["loss"] == pytest.approx(line["cross_entropy"] + line["prompt_distance"]) for line in steps)


def test_checkpoint_and_export_hold_prompts_alone(results: dict[str, Any], folder: Path) -> None:
    values = stored(folder / "run")
    names = ["context", *(f"attention.{part}.weight" for part in ("query", "key", "value", "output"))]
    kinds = ("weights", "momentum_buffer")
    assert values.keys() == {f"{kind}/prompts.{name}" for kind in kinds for name in names}
    exported = load_file(folder / "run" / "prompts.safetensors")
    assert exported.keys() == set(names)
    assert not any((folder / run / "model.safetensors").exists() for run in ("run", "killed"))
    prompts = prompt_file.load(folder / "run" / "prompts.safetensors")
    origin = prompts.origin
    assert (origin.method, origin.fit.width, origin.fit.context_length) == ("contcoop", WIDTH, 77)
    assert origin.class_names == tuple(f"class number {label}" for label in range(3))
    assert origin.templates == ("a photo of a {}", "a rather blurry picture of the {}.")
    best = json.loads((folder / "run" / "best" / "selected.json").read_text())["step"]
    assert (folder / "run" / "best" / "prompts.safetensors").is_file()
    if best == STEPS:
        assert torch.equal(exported["context"], values["weights/prompts.context"])


def test_resumed_run_has_the_same_bits(results: dict[str, Any], folder: Path) -> None:
    assert "train.momentum" in results["other"]
    assert "error" in results["other"]
    assert "continues after" in results["resumed"]
    expected, resumed = stored(folder / "run"), stored(folder / "killed")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    first = (folder / "run" / "prompts.safetensors").read_bytes()
    assert first == (folder / "killed" / "prompts.safetensors").read_bytes()


def test_random_context_trains_by_adamw_in_pieces(results: dict[str, Any], folder: Path) -> None:
    assert "error" not in results["adamw"], results["adamw"]
    values = stored(folder / "adamw")
    assert values.keys() == {f"{kind}/prompts.context" for kind in ("weights", "exp_avg", "exp_avg_sq")}
    assert values["weights/prompts.context"].shape == (3, WIDTH)
    assert bool(values["exp_avg/prompts.context"].any())


def test_update_has_the_accuracies_of_plain_code(results: dict[str, Any]) -> None:
    measured = results["update"]
    update = measured["update"]
    assert set(update.sets) == {"base", "new"}
    for (name, kind), value in measured["plain"].items():
        assert getattr(update.sets[name], kind) == pytest.approx(value, abs=1e-6), (name, kind)
    assert measured["python"] == {name: each.new for name, each in update.sets.items()}
    assert set(update.summaries) == {"base, harmonic mean", "mean"}
    assert measured["repeated"] == update
    labels = [row["label"] for row in measured["rows"]]
    assert len(set(labels)) == 5
    assert [row["classifier"] for row in measured["rows"][::2]] == [
        *("prompts", "learned prompts", "prompts", "learned prompts", "learned prompts"),
    ]
    assert [row["key"] for row in measured["rows"]] == [row["key"] for row in measured["again"]]
    # Prompts are part of what a result depends on.
    assert len({row["key"] for row in measured["rows"]}) == 10


def test_sgd_is_not_partitioned(results: dict[str, Any]) -> None:
    assert "deepspeed.zero_optimization.stage = 2: train.optimizer = sgd" in results["partitioned"]


def test_commands_on_weights_name_the_prompts(results: dict[str, Any], folder: Path) -> None:
    run = folder / "run"
    with pytest.raises(ConfigError, match="has learned prompts and no weights of its own"):
        find_weights(None, "--weights", run)
    model = ModelConfig(name=f"local-dir:{folder / 'model'}")
    with pytest.raises(ConfigError, match="holds learned prompts and no weights; name their file by --prompts"):
        load_into(create(model), model, list_checkpoints(run / "checkpoints")[-1])
    card = (run / "README.md").read_text()
    assert "prompts.safetensors" in card
    assert "open_clip.create_model_from_pretrained" not in card
    shutil.rmtree(folder / "adamw")
