"""Weights of every kind of checkpoint, bit for bit, and nothing executed that a file holds."""

import json
import os
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from dive_fast import towers
from dive_fast.config import Config, ConfigError, ModelConfig
from dive_fast.evaluate.weights import load_into


def moved(model: ModelConfig) -> dict[str, Tensor]:
    """Other weights than the model comes with, as open_clip has them."""
    torch.manual_seed(3)
    own = towers.create(model)
    return own.export({name: value + torch.randn(value.shape) for name, value in own.state_dict().items()})


def loaded(model: ModelConfig, path: Path) -> dict[str, Tensor]:
    built = load_into(towers.create(model, weights=False), model, path)
    return built.export(built.state_dict())


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("config", [tiny.CLIP, tiny.CLIP | {"custom_text": True}])
def test_files_of_this_engine_and_of_open_clip_are_read(tmp_path: Path, config: dict[str, Any]) -> None:
    model = ModelConfig(name=tiny.write_model(tmp_path / "model", config))
    state = moved(model)
    towers.save(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "plain.bin")
    # As open_clip's training writes it, from several GPUs.
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "epoch_3.pt"
    )
    for file in ("model.safetensors", "plain.bin", "epoch_3.pt"):
        assert_equal(loaded(model, tmp_path / file), state)
    theirs = open_clip.create_model(model.name, load_weights=False)
    open_clip.load_checkpoint(theirs, str(tmp_path / "epoch_3.pt"))
    assert_equal(loaded(model, tmp_path / "epoch_3.pt"), theirs.state_dict())


class Harmful:
    """What pickle calls when it reads this, it writes to the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_what_is_no_checkpoint_is_told_and_executes_nothing(tmp_path: Path) -> None:
    model = ModelConfig(name=tiny.write_model(tmp_path / "model"))
    with pytest.raises(ConfigError, match=r"nowhere.pt: no such checkpoint"):
        loaded(model, tmp_path / "nowhere.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"broken.safetensors: not weights of local-dir:.* open_clip can load"):
        loaded(model, tmp_path / "broken.safetensors")
    towers.save({"some": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other.safetensors: not weights of local-dir:"):
        loaded(model, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="no checkpoint there: expected <run>/checkpoints/step"):
        loaded(model, tmp_path)
    done = tmp_path / "done"
    torch.save({"module": Harmful(done)}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save(Harmful(done), tmp_path / "harmful.pt")
    torch.save(Harmful(done), tmp_path / "partitioned.pt")
    (tmp_path / "step1").mkdir()
    for name in ("model", "optim"):
        torch.save(Harmful(done), tmp_path / f"step1/zero_pp_rank_0_mp_rank_00_{name}_states.pt")
    for path in (tmp_path, tmp_path / "harmful.pt", tmp_path / "step1"):
        with pytest.raises(ConfigError) as caught:
            loaded(model, path)
        assert "\n" not in str(caught.value)
        assert not done.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def run(trees: list[dict[str, Any]]) -> None:
    from dive_fast import train
    from dive_fast.checkpoint import saver
    from dive_fast.ranks import join

    ranks, save = join(), saver.Saver.save

    def save_twice(self: saver.Saver, step: int, *args: Any, **kwargs: Any) -> None:
        save(self, step, *args, **kwargs)
        self._engine.deepspeed.save_checkpoint(str(self._folder.with_name("deepspeed")), tag=f"step{step}")

    saver.Saver.save = save_twice  # type: ignore[method-assign]
    for tree in trees:
        train.train(Config.model_validate_json(json.dumps(tree)), Path(tree["train"]["output"]), ranks)


@pytest.mark.slow
def test_checkpoints_of_a_run_hold_the_weights_that_it_exported(tmp_path: Path) -> None:
    trees = []
    for stage in (0, 2, 3):
        tree = tiny.write_config(tmp_path / str(stage), max_steps=2)
        tree["deepspeed"]["zero_optimization"]["stage"] = stage
        trees.append(tree)
    run_ranks(2, run, trees, init=False, timeout=240)
    for tree in trees:
        folder, model = Path(tree["train"]["output"]), ModelConfig(name=tree["model"]["name"])
        for checkpoint in ("checkpoints/step00000002", "deepspeed/step2"):
            assert_equal(loaded(model, folder / checkpoint), load_file(folder / "model.safetensors"))
