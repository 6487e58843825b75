"""The shipped configs have the hyper-parameters of the paper."""

from pathlib import Path
from typing import Any

import pytest
from config_files import CONFIGS
from PIL import Image

from dive_fast.data.open_dataset import open_target
from dive_fast.methods import registry
from dive_fast.methods.run_config import load_run_config
from dive_fast.projections import rules as projections

# The paper's hyper-parameters (arXiv 2511.09973, Table 11)

IMAGENET = {"learning_rate": 1e-5, "weight_decay": 0.1, "epochs": 10, "batches": (512, 512)}
WILDS = {"learning_rate": 3e-5, "weight_decay": 0.2, "epochs": 20, "batches": (256, 256)}
PAPER: dict[str, dict[str, Any]] = {
    "vitb16_dive": IMAGENET,
    "vitl14_dive": IMAGENET | {"batches": (512, 256)},
    **{f"vitb16_{name}": IMAGENET | {"batches": (512, None)} for name in ("vanilla_ft", "lp_ft", "flyp")},
    **{f"vitb16_{name}": IMAGENET for name in ("flyp_replay", "snd", "cosine", "avl", "pvl")},
    **{f"{name}_dive": WILDS for name in ("iwildcam", "fmow")},
    # 3e-5 is DiVE's; the baselines have 1e-5 there too (appendix C).
    **{f"{name}_flyp": WILDS | {"learning_rate": 1e-5, "batches": (256, None)} for name in ("iwildcam", "fmow")},
}
SELF_DISTILLED: dict[str, dict[str, Any]] = {
    "vitb16_tracer": IMAGENET | {"batches": (512, None), "precision": "bf16"},
    "vitb16_tracer_fd": IMAGENET | {"batches": (512, None), "precision": "bf16"},
    "vitl14_tracer": IMAGENET | {"batches": (224, None), "precision": "bf16"},
    "vitb16_carot": IMAGENET | {"batches": (512, None), "precision": "fp16"},
    # Of neither paper; fp16, since bf16 rounds DiVE's difference vectors away.
    "vitb16_tracer_dive": IMAGENET | {"batches": (512, 512), "precision": "fp16"},
}
"""Hyper-parameters of TRACER (arXiv 2605.29380) and CaRot (arXiv 2311.01723), as their code has them."""
PROJECTED = {
    **{f"vitb16_flyp_{rule}": ("vitb16_flyp", rule) for rule in ("digrap", "spd", "ftp", "l2sp")},
    **{f"{base}_digrap": (base, "digrap") for base in ("vitb16_dive", "vitb16_vanilla_ft")},
}
"""Configs with a method in weight space: the config that they start from, and ``projection.name``."""
ADAPTED = {"vitb16_dive_lora": "vitb16_dive"}
"""Configs with adapters, and the config that they start from."""
OTHERS = (
    *("demo", "vitb16_car_ft", "vitb16_lipsum", "vitb16_starft"),
    *("vitb32_grace", "vitb32_pmg_aft", "vitb32_tecoa"),
    *("vitb16_coop", "vitb16_kgcoop", "vitb16_contcoop", "vitb16_vqa_dive", "vitb16_vqa_flyp"),
    *(*SELF_DISTILLED, *PROJECTED, *ADAPTED),
)
"""Configs of methods or data that are not the paper's."""
VECTORS = {"decay": 0.99, "average_weight": 1, "pairwise_weight": 1, "mean_gradient": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "dive": VECTORS,
    "avl": VECTORS | {"pairwise_weight": 0},
    "pvl": VECTORS | {"average_weight": 0},
    "cosine": {"decay": 0.99, "average_start": 0, "mean_gradient": True},
}
HEAD = {"head_start": "zero_shot", "probe_epochs": 10, "probe_learning_rate": 1e-3}
DATA = {"train": "data/imagenet/train", "val": "data/imagenet/val", "reference": "data/cc3m/{00000..00331}.tar"}
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.json"))


def test_every_shipped_config_is_the_papers_or_listed_as_another() -> None:
    assert sorted([*PAPER, *OTHERS]) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_loads(name: str) -> None:
    load_run_config(name, folder=CONFIGS)


@pytest.mark.parametrize("name", PAPER)
def test_shipped_config_has_the_papers_hyper_parameters(name: str) -> None:
    config, paper = load_run_config(name, folder=CONFIGS), PAPER[name]
    data, train = config.data, config.train
    batches = data.target.batch_size, data.reference and data.reference.batch_size
    assert batches == paper["batches"]
    assert train.learning_rate == paper["learning_rate"]
    assert train.weight_decay == paper["weight_decay"]
    assert train.epochs == paper["epochs"]
    assert train.warmup_steps == 500
    assert train.betas == (0.9, 0.999)
    assert train.epsilon == 1e-8
    assert train.decay_all_parameters
    assert train.max_steps is None
    assert (train.precision, train.checkpoint_every, config.teacher.mode) == ("fp16", 2500, "cache")
    if data.reference is not None:
        assert data.reference.path == DATA["reference"]
    if name.startswith("vit"):
        evaluation = {name: one.path for name, one in config.evaluate.sets.items()}
        assert (data.target.path, evaluation) == (DATA["train"], {"imagenet_val": DATA["val"]})
        model = {"vitb16": "ViT-B-16-quickgelu", "vitl14": "ViT-L-14-quickgelu"}
        assert config.model.name == model[name.partition("_")[0]]
    assert config.deepspeed["zero_optimization"] == {"stage": "auto"}
    # DeepSpeed would clip at 1 if nothing were said.
    assert config.deepspeed["gradient_clipping"] == 0
    # The paper's "pre-trained" rows are OpenAI's weights, which need quick GELU.
    assert (config.model.pretrained, config.model.name.endswith("-quickgelu")) == ("openai", True)
    objective = config.objective
    assert objective.name == name.partition("_")[2]
    weight = {"snd": 1, "flyp_replay": 1}.get(objective.name, None if data.reference is None else 1000)
    assert (objective.weight, objective.reference_every) == (weight, 1)
    choice = registry.choose(objective)
    assert choice.reference_options.model_dump() == OPTIONS.get(objective.name, {})
    assert choice.target_options.model_dump() == (
        HEAD | {"probe": objective.name == "lp_ft"} if choice.needs.head else {}
    )
    # Early stopping on ID validation: the best epoch is kept.
    assert (config.evaluate.every_epochs, config.evaluate.select) == (1, next(iter(config.evaluate.sets)))


@pytest.mark.parametrize("name", SELF_DISTILLED)
def test_self_distilled_config_has_its_papers_hyper_parameters(name: str) -> None:
    config, paper = load_run_config(name, folder=CONFIGS), SELF_DISTILLED[name]
    data, train = config.data, config.train
    assert (data.target.batch_size, data.reference and data.reference.batch_size) == paper["batches"]
    assert (train.learning_rate, train.weight_decay, train.epochs) == (1e-5, 0.1, 10)
    assert (train.warmup_steps, train.betas, train.epsilon, train.precision) == (
        *(500, (0.9, 0.999), 1e-8),
        paper["precision"],
    )
    assert (config.model.pretrained, config.deepspeed["gradient_clipping"]) == ("openai", 0)
    choice, method = registry.choose(config.objective), name.partition("_")[2]
    assert config.objective.name == method
    options = choice.target_options.model_dump()
    if choice.target.name == "carot":
        weights, teacher = (1.5, 0.2, 0.05), (500, 0.05, 0.9, 0.2)
    else:
        logits = 0.0 if method == "tracer_fd" else 1.0
        weights, teacher = (0.9, 2000.0, logits, logits, logits, 0.05), (0.5, "steps", 1)
    assert tuple(options.values()) == (*weights, *teacher)


@pytest.mark.parametrize("name", PROJECTED)
def test_projected_config_differs_from_its_base_in_rule_and_decay(name: str) -> None:
    base, rule = PROJECTED[name]
    projected, plain = (load_run_config(each, folder=CONFIGS) for each in (name, base))
    assert (projected.projection.name, plain.projection.name) == (rule, "none")
    assert (projected.train.weight_decay, plain.train.weight_decay) == (0, 0.1)
    options = projections.table()[rule].Options().model_dump()
    assert (projected.projection.model_extra or {}) | options == options
    decayed = projected.train.model_copy(update={"weight_decay": 0.1})
    assert projected.model_copy(update={"projection": plain.projection, "train": decayed}) == plain


@pytest.mark.parametrize("name", ADAPTED)
def test_adapted_config_differs_from_its_base_in_adapters_and_rate(name: str) -> None:
    adapted, plain = (load_run_config(each, folder=CONFIGS) for each in (name, ADAPTED[name]))
    assert adapted.model.lora is not None
    assert (adapted.model.lora.rank, adapted.model.lora.alpha, adapted.train.learning_rate) == (64, None, 2e-4)
    changed = {
        "model": adapted.model.model_copy(update={"lora": None}),
        "train": adapted.train.model_copy(update={"learning_rate": 1e-5}),
    }
    assert adapted.model_copy(update=changed) == plain


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "warmup"),
    [("coop", 32, 50, 500), ("kgcoop", 128, 100, 125), ("contcoop", 32, 50, 500)],
)
def test_prompt_config_has_the_settings_of_its_code(name: str, batch: int, epochs: int, warmup: int) -> None:
    config = load_run_config(f"vitb16_{name}", folder=CONFIGS)
    target, train = config.data.target, config.train
    assert (config.objective.name, target.shots, target.batch_size) == (name, 16, batch)
    assert (target.crop_scale, target.horizontal_flip) == ((0.08, 1.0), 0.5)
    assert (train.optimizer, train.learning_rate, train.momentum, train.weight_decay) == ("sgd", 0.002, 0.9, 5e-4)
    # 16 images of each of 1000 classes: the warm-up is the first epoch.
    assert (train.epochs, train.warmup_steps, train.precision) == (epochs, warmup, "fp16")
    assert warmup == 16 * 1000 // batch


def write_flyp(folder: Path) -> None:
    """FLYP's folder as its scripts leave it: two templates an image, paths relative to where they ran."""
    lists = {
        "datasets/csv/iwildcam_v2.0/train.csv": "./datasets/data/iwildcam_v2.0/train/a.jpg",
        "datasets/csv/fmow.csv": "./datasets/data/fmow_v1.1/images/rgb_img_7.png",
    }
    for name, image in lists.items():
        for file in (folder / name, folder / image):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(folder / image)
        (folder / name).write_text(f"title\tfilepath\na photo of x.\t{image}\nx in the wild.\t{image}\n")


@pytest.mark.parametrize("name", ["iwildcam_dive", "iwildcam_flyp", "fmow_dive", "fmow_flyp"])
def test_wilds_configs_open_the_csv_of_flyp(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_flyp(tmp_path / "data/flyp")
    config = load_run_config(name, folder=CONFIGS)
    (sample,) = open_target(config.data.target).samples
    assert len(sample.texts) == 2
    # Its evaluation sets lie in the same folder, as WILDS leaves them.
    assert all((tmp_path / (one.path or "")).is_dir() for one in config.evaluate.sets.values())
