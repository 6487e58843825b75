"""Runs with adapters: checkpoints of factors alone, resumes, evaluation, export, projections, freezing, decay."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from test_resume import Folder

from dive_fast.checkpoint.load_weights import load_into
from dive_fast.checkpoint.manifest import Tensors, list_checkpoints
from dive_fast.config.schema import ModelConfig
from dive_fast.distributed import join
from dive_fast.errors import ConfigError
from dive_fast.methods.method import Part
from dive_fast.model.adapters import is_factor
from dive_fast.model.head import find_head
from dive_fast.model.towers import create

LORA = ("model.lora", {"rank": 4, "targets": ["q", "v", "out", "mlp"]})
RULES = ("digrap", "spd", "ftp", "l2sp")
CASES: dict[str, list[tuple[str, Any]]] = {
    "vanilla_ft": [("projection", {"name": "digrap"}), ("train.precision", "fp16")],
    "lp_ft": [("deepspeed.zero_optimization.stage", 0)],
    "flyp_replay": [("projection", {"name": "spd"}), ("train.activation_checkpointing", "selective")],
    "snd": [("projection", {"name": "ftp"}), ("train.activation_checkpointing", "full")],
    "cosine": [("projection", {"name": "l2sp"}), ("train.ema", 0.5)],
    "tracer": [("train.micro_batch_size", 3)],
    "carot": [("train.decay_all_parameters", False), ("train.layer_decay", 0.5)],
    "lipsum": [("train.micro_batch_size", 5), ("teacher.mode", "online")],
    "starft": [("model.lora", LORA[1] | {"towers": ["image"]})],
    "car_ft": [("model.lora", LORA[1] | {"dropout": 0.5}), ("model.freeze", ["logit_scale", "*.resblocks.0.*"])],
}
"""Options of one step by each method."""
RULE_OF = {options[0][1]["name"]: name for name, options in CASES.items() if options[0][0] == "projection"}
STEPS = 4


def tree_of(folder: Path) -> dict[str, Any]:
    Part.backend = "torch"
    tree = tiny.write_config(folder, max_steps=STEPS, checkpoint_every=1, keep_last=9, epochs=2)
    tree["deepspeed"]["zero_optimization"]["stage"] = 1
    tree["teacher"] = {"path": str(folder / "teacher")}
    return tree | {"evaluate": {"baseline": False, "probe": 0}}


def state(run: Folder, printed: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    stored = Tensors(list_checkpoints(run.path / "checkpoints")[-1])
    names = {kind: stored.shapes(kind) for kind in ("weights", "fixed", "exp_avg")}
    values = {name: stored.read("weights", name, torch.device("cpu")) for name in names["weights"]}
    return {
        "printed": printed,
        "lines": lines,
        "names": names,
        "values": values,
        "model": load_file(run.path / "model.safetensors"),
    }


def one_rank(folder: Path) -> dict[str, Any]:
    ranks, tree = join(), tree_of(folder)
    results: dict[str, Any] = {}

    def run(name: str, *overrides: Any, kill_at: int | None = None) -> Folder:
        each = Folder(ranks, tree, folder / name)
        printed = each.start(*overrides, kill_at=kill_at)
        results[name] = printed if kill_at or "error" in printed else state(each, printed)
        return each

    run("dive", LORA, ("train.schedule", "joint"))
    run("killed", LORA, ("train.schedule", "joint"), kill_at=3)
    killed = Folder(ranks, tree, folder / "killed")
    results["other rank"] = killed.start(("model.lora", {"rank": 2}), ("train.schedule", "joint"))
    results["without"] = killed.start(("train.schedule", "joint"))
    results["resumed"] = state(killed, killed.start(LORA, ("train.schedule", "joint")))
    tree["train"]["max_steps"] = 1
    for name, options in CASES.items():
        run(name, LORA, ("objective.name", name), *options)
    run("no gradient", ("model.lora", {"rank": 4, "towers": ["image"]}), ("model.freeze", ["image"]))
    frozen = ("model.freeze", ["image", "text:2"]), ("train.layer_decay", 0.5), ("train.weight_decay", 0.0)
    tree["train"]["warmup_steps"] = 0
    run("plain", ("objective.name", "flyp_replay"), *frozen)
    return results


def run_on(folder: Path, base: Path, name: str, overrides: list[Any]) -> dict[str, Any]:
    ranks, tree = join(), tree_of(folder)
    tree["model"]["name"] = f"local-dir:{base}"
    run = Folder(ranks, tree, folder / name)
    printed = run.start(*overrides)
    return state(run, printed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return run_ranks(1, one_rank, folder, init=False, timeout=550)[0]


def test_checkpoint_holds_factors_alone(results: dict[str, Any]) -> None:
    names = results["dive"]["names"]
    assert names["fixed"] == {}
    assert names["weights"] == names["exp_avg"]
    assert {name for name in names["weights"] if not is_factor(name)} == {"logit_scale"}
    assert 0 < sum(torch.Size(shape).numel() for shape in names["weights"].values()) < 2e4


def test_trained_factors_move_and_the_model_with_them(results: dict[str, Any], folder: Path) -> None:
    assert "model.lora: 20 layers of the image and text towers adapted, rank 4" in results["dive"]["printed"]
    assert "fast blocks: image and text towers" in results["dive"]["printed"]
    values, model = results["dive"]["values"], results["dive"]["model"]
    assert all(value.any() for value in values.values())
    base = load_file(folder / "model" / "open_clip_model.safetensors")
    assert model.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], model[name])}
    assert changed - {"logit_scale"} == {
        f"{tower}transformer.resblocks.{block}.{layer}"
        for tower in ("visual.", "")
        for block in range(2)
        for layer in ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    }
    rows = model["visual.transformer.resblocks.0.attn.in_proj_weight"].chunk(3)
    assert torch.equal(rows[1], base["visual.transformer.resblocks.0.attn.in_proj_weight"].chunk(3)[1])


def test_adapter_file_and_base_give_the_exported_model(results: dict[str, Any], folder: Path) -> None:
    factors, model = load_file(folder / "dive" / "adapter.safetensors"), results["dive"]["model"]
    base = load_file(folder / "model" / "open_clip_model.safetensors")
    assert len(factors) == 2 * 20
    name = "visual.transformer.resblocks.1.mlp.c_fc"
    expected = base[f"{name}.weight"] + factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"]
    torch.testing.assert_close(model[f"{name}.weight"], expected)
    assert not (folder / "plain" / "adapter.safetensors").exists()


def test_first_step_equals_that_of_the_frozen_model(results: dict[str, Any]) -> None:
    # B is zero, so the first loss is that of the pre-trained weights.
    first, plain = (results[name]["lines"][0]["contrastive_loss"] for name in ("flyp_replay", "plain"))
    assert first == pytest.approx(plain, rel=1e-5)


def test_run_without_adapters_freezes_and_decays_its_rate(results: dict[str, Any], folder: Path) -> None:
    run, base = results["plain"], load_file(folder / "model" / "open_clip_model.safetensors")
    moved = {name: (run["model"][name] - base[name]).abs().max().item() for name in base}
    trained = {"logit_scale", "text_projection", "ln_final.weight", "ln_final.bias"}
    block = {name for name in base if name.startswith("transformer.resblocks.1.")}
    assert {name for name, change in moved.items() if change > 0} == trained | block
    # The first update of AdamW has the length of the learning rate: 1e-3, and half of it in the last block.
    assert moved["text_projection"] == pytest.approx(1e-3, rel=0.05)
    assert moved["transformer.resblocks.1.mlp.c_fc.weight"] == pytest.approx(5e-4, rel=0.05)
    assert run["names"]["fixed"].keys() >= {"visual.proj"}


def test_resumed_run_has_the_same_bits(results: dict[str, Any]) -> None:
    assert "continues after" in results["resumed"]["printed"]
    for name, value in results["dive"]["values"].items():
        assert torch.equal(value, results["resumed"]["values"][name]), name
    assert results["dive"]["lines"][-1]["loss"] == results["resumed"]["lines"][-1]["loss"]


def test_changed_adapters_are_refused(results: dict[str, Any]) -> None:
    assert "model.lora" in results["other rank"]
    assert "error" in results["other rank"]
    assert "model.lora" in results["without"]
    assert "error" in results["without"]


def test_half_without_trained_parameters_is_refused(results: dict[str, Any]) -> None:
    # The logit scale is trained, on which the loss of the reference batch does not depend.
    assert (
        "model.freeze: the loss of the reference batch depends on no trained parameter" in results["no gradient"]
    )


@pytest.mark.parametrize("name", CASES)
def test_method_trains_factors(results: dict[str, Any], name: str) -> None:
    run = results[name]
    assert not isinstance(run, str), run
    others = {each for each in run["names"]["weights"] if not is_factor(each)}
    assert others <= {"logit_scale", "head.weight", "head.bias"}
    assert run["names"]["fixed"] == {}
    is_image_alone = name in ("vanilla_ft", "lp_ft", "starft", "lipsum", "car_ft")
    assert any(each.startswith("text.") for each in run["values"]) != is_image_alone
    assert all(value.isfinite().all() for value in run["values"].values())
    assert any(value.any() for each, value in run["values"].items() if "lora_B" in each)


def test_frozen_blocks_and_logit_scale_have_no_factors(results: dict[str, Any]) -> None:
    names = results["car_ft"]["names"]["weights"]
    assert "logit_scale" not in names
    assert not any(".resblocks.0." in name for name in names)
    assert any(".resblocks.1." in name for name in names)


@pytest.mark.parametrize("rule", RULES)
def test_anchor_of_factors_is_zero(results: dict[str, Any], rule: str) -> None:
    first = results[RULE_OF[rule]]["lines"][0]
    # A is random at the start, B zero: the distance of the first update is the norm of A. FTP measures it after
    # its first step, which leaves 1e-8 of each row.
    assert (first["projection/distance"] > 0.1) == (rule != "ftp")
    assert ("projection/relative_distance" in first) == ("head.weight" in results[RULE_OF[rule]]["values"])


def test_checkpoint_and_export_are_evaluated_alike(results: dict[str, Any], folder: Path) -> None:
    model = ModelConfig(name=f"local-dir:{folder / 'model'}")
    exported, loaded = create(model, weights=False), create(model, weights=False)
    load_into(exported, model, folder / "dive" / "model.safetensors")
    load_into(loaded, model, folder / "dive" / "checkpoints" / f"step{STEPS:08d}")
    assert exported.state_dict().keys() == loaded.state_dict().keys()
    for name, value in exported.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert find_head(folder / "vanilla_ft" / "model.safetensors") is not None


def test_checkpoint_of_other_weights_is_refused(results: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    model = ModelConfig(name=tiny.write_model(tmp_path, tiny.FEW_TOKENS, seed=5))
    with pytest.raises(ConfigError, match="holds adapters alone, of other weights than local-dir"):
        load_into(create(model), model, folder / "dive" / "checkpoints" / f"step{STEPS:08d}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_train_as_one(results: dict[str, Any], folder: Path, tmp_path: Path, stage: int) -> None:
    zero = ("deepspeed.zero_optimization.stage", stage)
    both = run_ranks(
        2,
        run_on,
        tmp_path,
        folder / "model",
        "run",
        [LORA, zero, ("train.schedule", "joint")],
        init=False,
        timeout=300,
    )
    for name, value in results["dive"]["values"].items():
        torch.testing.assert_close(both[0]["values"][name], value, rtol=1e-3, atol=1e-5)
