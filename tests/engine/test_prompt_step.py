"""Steps that learn prompts: gradients against float64, in pieces of classes, on several ranks, in fp16."""

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from distributed import run_ranks
from step_oracle import LABELS, TOTAL_STEPS, WIDTH, Stage, batches, config
from torch import Tensor

from dive_fast.data.prompt_files import Template
from dive_fast.engine.step import Engine, StepBatches, check_hooks
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.methods.method import Part, Start
from dive_fast.methods.run_config import RunConfig
from dive_fast.model.towers import tokenizer_of

NAMES = ("dog", "white cat", "bird", "dog", "two birds in a tree")
"""Two classes have the same name."""
HEADS, SPREAD = 4, 0.2
METHODS = ("coop", "kgcoop", "contcoop")
PATHS: dict[int, list[tuple[str, int, int | None, str]]] = {
    1: [*((name, 0, micro, "fp32") for name in METHODS for micro in (None, 2)), ("contcoop", 0, None, "fp16")],
    2: [("kgcoop", 0, None, "fp32"), ("contcoop", 2, 1, "fp32")],
}
"""Number of ranks -> (method, ZeRO stage, micro-batch size, precision)."""


def settings(folder: Path, path: tuple[str, int, int | None, str], **options: Any) -> RunConfig:
    name, stage, micro, precision = path
    tree = config(folder, stage, "sequential", micro, precision).model_dump(mode="json")
    tree["objective"] = {"name": name} | ({"heads": HEADS} if name == "contcoop" else {}) | options
    return RunConfig.model_validate_json(json.dumps(tree))


def prompts_of(stage: Stage, run: RunConfig) -> tuple[Any, Any]:
    """A method that was started, and towers with its prompts moved from their start."""
    method, towers = registry.create(run.objective, WIDTH, total_steps=TOTAL_STEPS), copy.deepcopy(stage.student)
    tokenizer, templates = tokenizer_of(run.model), (Template("a photo of a {}."), Template("the {}."))

    def embed(texts: Any) -> Tensor:
        with torch.no_grad():
            return F.normalize(towers.encode_text(tokenizer(list(texts)), 77))

    towers.eval()
    method.start(Start(embed, tokenizer, towers.vocabulary, towers.pooled_at, NAMES, templates, towers))
    towers.prompts = method.target_loss.learned_prompts(towers)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in towers.prompts.parameters():
            parameter.add_(SPREAD * torch.randn(parameter.shape, generator=generator))
    return method, towers


def run_paths(folder: Path, count: int) -> dict[Any, Any]:
    Part.backend = "torch"
    stage, results = Stage(folder), {}
    for path in PATHS[count]:
        run = settings(folder, path)
        method, towers = prompts_of(stage, run)
        engine = Engine(run, towers, method, stage.ranks, TOTAL_STEPS)
        if engine.scale.dynamic:
            engine.scale.value.fill_(1024.0)
        frozen = copy.deepcopy({name: p for name, p in towers.named_parameters() if not p.requires_grad})
        results[path] = stage.gradients(engine, StepBatches(stage.target))
        engine.update(torch.tensor(1.0))
        for name, parameter in frozen.items():
            assert torch.equal(parameter, dict(towers.named_parameters())[name]), name
    return results | {"inputs": oracle_inputs(stage)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.write_model(folder, tiny.QUICKGELU)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[Any, Any]:
    return {count: run_ranks(count, run_paths, folder, count, init=False)[0] for count in PATHS}


@pytest.fixture(scope="module")
def stage(results: dict[Any, Any]) -> dict[str, Any]:
    """The parts of the oracle: the student in float64 and the prompts of each method."""
    inputs: dict[str, Any] = results[1]["inputs"]
    return inputs


def oracle_inputs(stage: Stage) -> dict[str, Any]:
    inputs: dict[str, Any] = {"weights": {}, "prompts": {}}
    inputs["weights"] = {stage.student.exported_name(n): w for n, w in stage.student.state_dict().items()}
    for name in METHODS:
        _, towers = prompts_of(stage, settings(stage.folder, (name, 0, None, "fp32")))
        inputs["prompts"][name] = towers.prompts.state_dict()
    return inputs


def attended(context: Tensor, names: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The context of one class, written head by head."""

    def norm(rows: Tensor) -> Tensor:
        centred = rows - rows.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()

    query, key, value, output = (
        weights[f"attention.{part}.weight"] for part in ("query", "key", "value", "output")
    )
    queries, keys, values = norm(context) @ query.T, norm(names) @ key.T, norm(names) @ value.T
    size, parts = context.shape[1] // HEADS, []
    for head in range(HEADS):
        own = slice(head * size, (head + 1) * size)
        scores = (queries[:, own] @ keys[:, own].T / size**0.5).exp()
        parts.append(scores / scores.sum(1, keepdim=True) @ values[:, own])
    return context + torch.cat(parts, dim=1) @ output.T


def oracle(folder: Path, stage: dict[str, Any], name: str) -> tuple[dict[str, Tensor], float]:
    """Gradients and loss in float64 from open_clip's model, one class at a time."""
    model: Any = open_clip.create_model(f"local-dir:{folder}").eval()
    scale = stage["weights"]["logit_scale"].reshape(())
    model.load_state_dict(stage["weights"] | {"logit_scale": scale})
    model = model.double()
    weights = {key: value.double().requires_grad_() for key, value in stage["prompts"][name].items()}
    tokenizer = open_clip.get_tokenizer("ViT-B-16")

    def text(tokens: Tensor, context: Tensor | None = None) -> Tensor:
        end = int(tokens.argmax())
        embedded = model.token_embedding.weight[tokens[: end + 1]]
        if context is not None:
            embedded = torch.cat([embedded[:1], context, embedded[1 + len(context) :]])
        x = (embedded + model.positional_embedding[: end + 1])[None]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[: end + 1, : end + 1]))
        return F.normalize(x[0, end] @ model.text_projection, dim=0)

    rows, hand = [], []
    for class_name in NAMES:
        tokens = tokenizer([f"a photo of a {class_name}."])[0]
        context = weights["context"]
        if name == "contcoop":
            names = model.token_embedding.weight[tokens[5 : int(tokens.argmax()) - 1]]
            context = attended(context, names, weights)
        rows.append(text(tokens, context))
        each = [
            text(tokenizer([template])[0]) for template in (f"a photo of a {class_name}.", f"the {class_name}.")
        ]
        hand.append(F.normalize(torch.stack(each).mean(0), dim=0).detach())
    classes, kept = torch.stack(rows), torch.stack(hand)
    images = F.normalize(model.encode_image(batches(folder)["target_images"].double())).detach()
    scale = model.logit_scale.exp().detach()
    logits = scale * images @ classes.T
    loss = F.cross_entropy(logits, torch.tensor(LABELS))
    if name == "kgcoop":
        loss = loss + 8 * (1 - (classes * kept).sum(1).mean())
    if name == "contcoop":
        old = (scale * images @ kept.T).log_softmax(1)
        loss = loss + (old.exp() * (old - logits.log_softmax(1))).sum(1).mean()
    loss.backward()
    return {f"prompts.{key}": value.grad for key, value in weights.items()}, loss.item()


@pytest.mark.parametrize("name", METHODS)
def test_gradients_equal_float64_on_every_path(
    folder: Path, stage: dict[str, Any], results: dict[Any, Any], name: str
) -> None:
    expected, loss = oracle(folder, stage, name)
    paths = [(count, path) for count in PATHS for path in PATHS[count] if path[0] == name]
    assert len(paths) >= 2
    for count, path in paths:
        gradients, metrics = results[count][path]
        is_half = path[3] == "fp16"
        assert metrics["loss"] == pytest.approx(loss, rel=1e-2 if is_half else 1e-5)
        assert gradients.keys() == expected.keys()
        for key, gradient in expected.items():
            error = (gradients[key] - gradient).norm() / gradient.norm()
            assert error < (2e-2 if is_half else 5e-5), f"{path}, {key}: relative error {error:.1e}"


def test_options_of_the_model_are_refused(folder: Path) -> None:
    run = settings(folder, ("coop", 0, None, "fp32"))
    tree = run.model_dump(mode="json")
    method = registry.create(run.objective, WIDTH)
    with pytest.raises(ConfigError, match="has learned prompts, which need all weights on each rank"):
        check_hooks({"zero_optimization": {"stage": 3}}, method, "sequential")
    for section, key, value in (
        ("model", "lora", {"rank": 2}),
        ("train", "ema", 0.5),
        ("projection", "name", "l2sp"),
        ("objective", "reference", "dive"),
    ):
        changed = json.dumps(tree | {section: tree[section] | {key: value}})
        with pytest.raises(ValueError, match=rf"{section}.{key}: .*trains prompts and no weight"):
            RunConfig.model_validate_json(changed)
