"""Tests of the target half's teacher: what it copies, its pieces and their order, its move and its export."""

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from step_oracle import TARGET, WIDTH, Stage
from test_hooks import TRAIN, FrozenTeacherToy, MovingTeacherToy, Toy, max_error
from torch import Tensor

from dive_fast.checkpoint.export import MODEL, TEACHER, copy_model, write_model
from dive_fast.config.schema import ModelConfig, ObjectiveConfig
from dive_fast.engine.step import Engine, StepBatches, check_hooks
from dive_fast.engine.target_teacher import TargetTeacher
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.methods.method import WEIGHT_HOOKS, Method, Part
from dive_fast.model.towers import Towers, create

ZERO = (0, 1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.write_model(path, tiny.FEW_TOKENS)
    return path


def images_only(kind: type[Toy]) -> Method:
    """A toy that tunes the image tower alone."""

    def tunes(self: Toy, parameter: str) -> bool:
        return parameter.startswith("visual.")

    changes = {name: getattr(Part, name) for name in WEIGHT_HOOKS if name != "penalty"} | {"tunes": tunes}
    return Method(type("ImagesOnly", (kind,), changes)(()))


def plain(kind: type[Toy]) -> Method:
    """A toy without hooks other than the teacher."""
    changes = {name: getattr(Part, name) for name in WEIGHT_HOOKS if name != "penalty"}
    return Method(type("Plain", (kind,), changes)(()))


def test_teacher_copies_tuned_parameters_alone(folder: Path) -> None:
    towers = create(ModelConfig(name=f"local-dir:{folder}"))
    towers.head = torch.nn.Linear(WIDTH, 3)
    towers.text.requires_grad_(False)
    teacher = TargetTeacher(towers, FrozenTeacherToy(()))
    assert towers.head is not None
    copies = dict(teacher.towers.named_parameters())
    for name, parameter in towers.named_parameters():
        if name.startswith("head."):
            assert name not in copies
        elif name.startswith("text."):
            assert copies[name] is parameter
        else:
            assert copies[name].data_ptr() != parameter.data_ptr()
            assert torch.equal(copies[name], parameter)
            assert parameter.requires_grad
    assert {name.split(".")[0] for name in teacher.copies} == {"visual", "logit_scale"}
    assert not any(p.requires_grad for p in teacher.towers.parameters())
    assert dict(teacher.state()) == {}
    # Buffers are the teacher's own: the mask of texts has the length of the latest batch.
    teacher.towers.encode_text(torch.ones(1, 77, dtype=torch.long), 5)
    assert (teacher.towers.text.attn_mask.shape, towers.text.attn_mask.shape) == ((5, 5), (77, 77))


def test_teacher_has_neither_dropout_nor_graph(tmp_path: Path) -> None:
    config = tiny.FEW_TOKENS | {"vision_cfg": tiny.VISION | {"patch_dropout": 0.5}}
    towers = create(ModelConfig(name=tiny.write_model(tmp_path, config))).train()
    teacher = TargetTeacher(towers, FrozenTeacherToy(()))
    images = torch.randn(3, 3, 32, 32)
    first, second = (teacher(images, None, None) for _ in range(2))
    assert torch.equal(first.image, second.image)
    assert not torch.equal(towers.encode_image(images), towers.encode_image(images))
    assert not any(p.requires_grad for p in (first.image, first.logit_scale))
    assert towers.training
    assert first.text is None


def run_two_ranks(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    Part.backend = "torch"
    stage = Stage(folder)
    return {"shared": shared_weights(stage), "moves": moves_by_kernel(stage)}


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[dict[str, dict[int, dict[str, Any]]]]:
    results: list[dict[str, dict[int, dict[str, Any]]]] = run_ranks(2, run_two_ranks, folder, timeout=300)
    return results


def shared_weights(stage: Stage) -> dict[int, dict[str, Any]]:
    """Of a student that tunes its image tower: whether the teacher's towers are right after two steps."""
    results = {}
    for zero in ZERO:
        engine = stage.engine(zero, method=images_only(FrozenTeacherToy), **TRAIN)
        for _ in range(2):
            engine.step(StepBatches(stage.target))
        assert engine.teacher is not None
        pretrained, student = stage.student.state_dict(), engine.towers
        teacher = engine.teacher.towers
        results[zero] = {
            "one text tower": all(a is b for a, b in zip(teacher.text.parameters(), student.text.parameters())),
            "pre-trained": all(torch.equal(t, pretrained[name]) for name, t in teacher.state_dict().items()),
            "student moved": not torch.equal(student.visual.proj, pretrained["visual.proj"]),
            "one image tower more": sum(p.numel() for p in engine.teacher.copies.values())
            == sum(p.numel() for p in student.visual.parameters()),
        }
        engine.deepspeed.destroy()
    return results


def test_shared_weights_stay_right_under_zero(two_ranks: list[dict[str, Any]]) -> None:
    for by_rank in two_ranks:
        for zero, results in by_rank["shared"].items():
            assert all(results.values()), (zero, results)


def moves_by_kernel(stage: Stage) -> dict[int, dict[str, Any]]:
    """Errors of two moves by the kernel against float64, and whether its table of addresses was kept."""
    results = {}
    for zero in ZERO:
        engine = stage.engine(zero, method=plain(MovingTeacherToy), **TRAIN)
        assert engine.teacher is not None
        engine.teacher._average._backend = "triton"
        tables, errors = [], []
        for step in range(2):
            before = {name: p.clone().double() for name, p in engine.teacher.state()}
            engine.step(StepBatches(stage.target))
            student, rate = dict(engine.towers.named_parameters()), 0.25 / (step + 1)
            exact = {name: p + rate * (student[name].detach().double() - p) for name, p in before.items()}
            errors.append(max_error({name: p.double() for name, p in engine.teacher.state()}, exact))
            assert max_error(before, exact) > 1e-5
            tables.append(engine.teacher._average._table)
        results[zero] = {"errors": errors, "kept": len(set(map(id, tables))) == 1 and tables[0] is not None}
        engine.deepspeed.destroy()
    return results


def test_kernel_moves_teacher_under_zero(two_ranks: list[dict[str, Any]]) -> None:
    for by_rank in two_ranks:
        for zero, results in by_rank["moves"].items():
            assert results["kept"], zero
            assert max(results["errors"]) < 1e-6, zero


Call = tuple[str, str, tuple[int, ...], int | None]


def calls_of_step(engine: Engine, stage: Stage) -> list[Call]:
    """Calls of both towers in a step: who, which tower, shape and length; those of a backward are left out."""
    calls: list[Call] = []
    assert engine.teacher is not None
    teacher = engine.teacher.towers
    image, text = Towers.encode_image, Towers.encode_text

    def name(towers: Towers) -> str:
        return "teacher" if towers is teacher else "student"

    def encode_image(self: Towers, images: Tensor) -> Tensor:
        calls.append((name(self), "image", tuple(images.shape), None))
        return image(self, images)

    def encode_text(self: Towers, tokens: Tensor, length: int | None = None) -> Tensor:
        calls.append((name(self), "text", tuple(tokens.shape), length))
        return text(self, tokens, length)

    with mock.patch.multiple(Towers, encode_image=encode_image, encode_text=encode_text):
        engine.step(StepBatches(stage.target))
    return calls


def run_one_rank(folder: Path, path: Path) -> tuple[dict[int | None, list[Call]], dict[str, bool]]:
    Part.backend = "torch"
    stage = Stage(folder)
    return calls_along_paths(stage), exports(stage, path)


@pytest.fixture(scope="module")
def one_rank(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[int | None, list[Call]], dict[str, bool]]:
    (results,) = run_ranks(1, run_one_rank, folder, tmp_path_factory.mktemp("export"), timeout=300)
    return results[0], results[1]


def calls_along_paths(stage: Stage) -> dict[int | None, list[Call]]:
    results = {}
    for micro in (None, 3):
        engine = stage.engine(0, micro=micro, method=plain(MovingTeacherToy), **TRAIN)
        results[micro] = calls_of_step(engine, stage)
        engine.deepspeed.destroy()
    return results


def test_teacher_encodes_trimmed_distinct_texts_in_the_students_pieces(one_rank: tuple[Any, Any]) -> None:
    for micro, by_both in one_rank[0].items():
        teacher = [call[1:] for call in by_both if call[0] == "teacher"]
        # Before the student's forward, so that their activations do not add up.
        assert [call[0] for call in by_both[: len(teacher)]] == ["teacher"] * len(teacher)
        student = [call[1:] for call in by_both[len(teacher) :]]
        assert sorted(teacher) == sorted(student[: len(teacher)])
        images, texts = ([call for call in teacher if call[0] == kind] for kind in ("image", "text"))
        assert sum(shape[0] for _, shape, _ in images) == TARGET
        # Four distinct prompts of eight, the longest of which has seven tokens.
        assert sum(shape[0] for _, shape, _ in texts) == 4
        assert {length for *_, length in texts} == {7}
        assert len(images) == len(texts) == (1 if micro is None else 3)


def exports(stage: Stage, path: Path) -> dict[str, bool]:
    """Whether each exported and copied file has the right weights."""
    results = {}
    (path / "copied").mkdir()
    for zero, kind in itertools.product((0, 2), (MovingTeacherToy, FrozenTeacherToy)):
        engine = stage.engine(zero, method=plain(kind), **TRAIN)
        for _ in range(2):
            engine.step(StepBatches(stage.target))
        write_model(engine, path / "exported")
        copy_model(path / "exported", path / "copied")
        assert engine.teacher is not None
        if kind is MovingTeacherToy:
            teacher = dict(engine.teacher.state())
            for where, file in itertools.product(("exported", "copied"), (TEACHER, MODEL)):
                weights = create(stage.student.config).load_exported(load_file(path / where / file)).state_dict()
                is_teacher = all(torch.equal(weights[name], p) for name, p in teacher.items())
                results[f"{zero} {where} {file}"] = is_teacher == (file == TEACHER)
        else:
            results[f"{zero} removed"] = not (path / "copied" / TEACHER).exists()
        engine.deepspeed.destroy()
    return results


def test_moving_teacher_is_exported_next_to_the_model(one_rank: tuple[Any, dict[str, bool]]) -> None:
    results = one_rank[1]
    assert all(results.values()), results
    assert len(results) == 10


def test_methods_with_a_teacher_are_refused_with_zero_3_or_offload() -> None:
    offload, refused_names = {"stage": 2, "offload_optimizer": {"device": "cpu"}}, set()
    for name in registry.table().presets:
        config = ObjectiveConfig(name=name)
        if (needs := registry.needs(config)).target_teacher == "none":
            continue
        assert needs.all_weights
        method = registry.create(config, WIDTH, total_steps=10)
        check_hooks({"zero_optimization": {"stage": 2}}, method, "sequential")
        for zero, option in (({"stage": 3}, "stage = 3"), (offload, "offload_optimizer")):
            with pytest.raises(ConfigError, match=f"{option}.*a teacher.*use stage 0, 1 or 2") as refused:
                check_hooks({"zero_optimization": zero}, method, "sequential")
            assert "\n" not in str(refused.value)
        refused_names.add(name)
    assert refused_names >= {"tracer", "tracer_fd", "tracer_dive", "carot", "lipsum", "starft"}
