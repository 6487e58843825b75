"""The registry: parts by name, their options, presets, and parts from outside."""

import itertools
import types
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.config.section import KeyedError, Section
from dive_fast.data.prompt_files import read_templates
from dive_fast.data.transforms import Preprocess
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.methods.method import Group, Loss, Preset, ReferenceLoss, Start, TargetLoss, TeacherOutputs
from dive_fast.model.features import Outputs, Pairs

WIDTH, CLASSES, COUNT = 6, 3, 4
TABLE = registry.table()
TARGETS = ", ".join(TABLE.targets)
PAIRS = list(itertools.product(TABLE.targets, [*TABLE.references, registry.NONE]))
TRAINED = [pair for pair in PAIRS if pair[1] == registry.NONE or not TABLE.targets[pair[0]].needs_prompts]
"""Pairs that can be trained: a loss on reference pairs has no effect on learned prompts."""


def objective(**section: Any) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(section)


def error_of(**section: Any) -> str:
    with pytest.raises(KeyedError) as caught:
        registry.choose(objective(**section))
    key = caught.value.key
    assert key.startswith("objective.")
    message = str(caught.value)
    assert key in message
    with pytest.raises(ConfigError) as raised:
        registry.create(objective(**section), WIDTH)
    assert str(raised.value) == message
    return message


def features(seed: int, *, has_logits: bool) -> tuple[Outputs, list[Tensor]]:
    """Random outputs of a half, and the leaves that they are of."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(COUNT, WIDTH, generator=generator, requires_grad=True) for _ in range(2)]
    logits = torch.randn(COUNT, CLASSES, generator=generator, requires_grad=True) if has_logits else None
    second = torch.randn(COUNT, WIDTH, generator=generator)
    outputs = Outputs(*leaves, torch.tensor([14.0]), logits, second)
    return outputs, leaves if logits is None else [*leaves, logits]


def unit_rows(count: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, WIDTH), dim=1)


def start() -> Start:
    templates = read_templates("simple")
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    preprocess = Preprocess((32, 32), (0.5,) * 3, (0.25,) * 3, "bicubic", "shortest")
    text = types.SimpleNamespace(token_embedding=torch.nn.Embedding(2, 2))
    towers: Any = types.SimpleNamespace(
        preprocess=preprocess, head=torch.nn.Linear(WIDTH, CLASSES), text=text, pooled_at="argmax", config=None
    )
    names = ("ant", "bee", "cat")
    return Start(lambda texts: unit_rows(len(texts)), tokenizer, 49408, "argmax", names, templates, towers)


# Combinations


@pytest.mark.parametrize(("target", "reference"), TRAINED)
def test_every_target_loss_trains_with_every_reference_loss(target: str, reference: str) -> None:
    section = objective(name=None, target=target, reference=reference)
    method = registry.create(section, WIDTH, total_steps=4)
    for part in method.parts:
        part.backend = "torch"
    method.start(start())
    assert method.needs == registry.needs(section)
    assert method.needs.reference == (reference != registry.NONE)
    assert type(method.target_loss) is TABLE.targets[target]
    outputs, leaves = features(0, has_logits=method.needs.head)
    if method.needs.prompts:
        classes = torch.randn(CLASSES, WIDTH, requires_grad=True)
        outputs, leaves = outputs._replace(classes=classes), [classes]
    labels = torch.arange(COUNT) % CLASSES
    frozen = None
    if method.needs.target_teacher != "none":
        frozen = TeacherOutputs(
            *(unit_rows(COUNT) for _ in range(2)), outputs.logit_scale, unit_rows(COUNT), unit_rows(5)
        )
    if method.reference_loss is None:
        loss = method.target(outputs, labels, teacher=frozen)
    else:
        others, more = features(1, has_logits=False)
        teacher = Pairs(unit_rows(COUNT), unit_rows(COUNT)) if method.needs.reference_teacher else None
        loss = method.joint(outputs, labels, others, teacher, target_teacher=frozen)
        loss.loss.backward()
        assert any(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in more)
    assert loss.loss.shape == ()
    assert torch.isfinite(loss.loss)
    if method.reference_loss is None:
        loss.loss.backward()
    assert any(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)


@pytest.mark.parametrize(("target", "reference"), PAIRS)
def test_resolved_objective_is_canonical(target: str, reference: str) -> None:
    sections = [{"name": target}, {"name": reference}]
    resolved = registry.resolve(objective(name=None, target=target, reference=reference))
    assert registry.resolve(objective(name=None, target=sections[0], reference=sections[1])) == resolved
    assert registry.resolve(resolved) == resolved
    assert registry.choose(resolved) == registry.choose(objective(name=None, target=target, reference=reference))
    for preset in TABLE.presets:
        assert registry.resolve(objective(name=preset, target=target, reference=reference)) == resolved


@pytest.mark.parametrize("name", TABLE.presets)
def test_preset_resolves_to_itself_with_all_options(name: str) -> None:
    preset, resolved = TABLE.presets[name], registry.resolve(objective(name=name))
    assert resolved.name == name
    assert (resolved.target, resolved.reference) == (None, None)
    assert set(resolved.model_extra or {}) == set(registry.options_of(preset))
    assert registry.resolve(resolved) == resolved
    choice = registry.choose(resolved)
    values = choice.target_options.model_dump() | choice.reference_options.model_dump()
    # The same parts by name are the same method.
    half = {"target": choice.target.name, "reference": registry.NONE}
    sections: dict[str, Any] = {"target": {"name": half["target"], **choice.target_options.model_dump()}}
    sections["reference"] = half["reference"]
    if choice.reference is not None:
        sections["reference"] = {"name": choice.reference.name, **choice.reference_options.model_dump()}
    equal = registry.choose(objective(name=None, **sections))
    assert equal._replace(preset=None) == choice._replace(preset=None)
    assert {key: values[key] for key in preset.fixed} == dict(preset.fixed)


@pytest.mark.parametrize("name", sorted(registry.table().presets))
def test_state_on_fake_tensors_keeps_no_real_tensor(name: str) -> None:
    # With one, later plans of the same process crashed.
    with FakeTensorMode():
        state = registry.create(objective(name=name), WIDTH, total_steps=4).state()
    for buffer in state.values():
        assert isinstance(buffer, FakeTensor)
        assert buffer.constant is None


def test_preset_is_found_by_its_parts_and_fixed_options() -> None:
    def name_of(target: Any, reference: Any) -> str | None:
        return registry.resolve(objective(name=None, target=target, reference=reference)).name

    assert name_of("contrastive", "none") == "flyp"
    assert name_of("contrastive", "replay") == "flyp_replay"
    assert name_of("contrastive", {"name": "dive", "decay": 0.5}) == "dive"
    assert name_of({"name": "cross_entropy", "probe": True}, "none") == "lp_ft"
    assert name_of({"name": "cross_entropy", "probe": False}, "none") == "vanilla_ft"
    # An option that vanilla FT does not have keeps the pair.
    assert name_of({"name": "cross_entropy", "probe_epochs": 3}, "none") is None
    assert name_of("cross_entropy", "dive") is None
    assert (
        registry.title_of(objective(name=None, target="cross_entropy", reference="dive")) == "cross-entropy + DiVE"
    )


def test_section_without_a_name_sets_options_of_the_presets_loss() -> None:
    assert registry.resolve(objective(name="avl", reference={"decay": 0.5})) == registry.resolve(
        objective(name="avl", decay=0.5)
    )
    resolved = registry.resolve(objective(name="lp_ft", target={"head_start": "random"}))
    assert (resolved.name, resolved.head_start) == ("lp_ft", "random")


def test_preset_keeps_the_fixed_options_of_its_own_half() -> None:
    choice = registry.choose(objective(name="lp_ft", reference="snd", probe_epochs=3))
    assert choice.target_options.model_dump()["probe"] is True
    assert choice.target_options.model_dump()["probe_epochs"] == 3
    assert (choice.preset, choice.title) == (None, "cross-entropy + SnD")


def test_weight_and_reference_every_reach_the_loss() -> None:
    for name, default in (("dive", 1000.0), ("cosine", 1000.0), ("snd", 1.0), ("flyp_replay", 1.0)):
        assert registry.choose(objective(name=name)).default_weight == default
        weights = []
        for section in ({}, {"weight": 3.0}, {"weight": 3.0, "reference_every": 2}, {"weight": 0.0}):
            loss: Any = registry.create(objective(name=name, **section), WIDTH).reference_loss
            weights.append(loss.weight)
        assert weights == [default, 3.0, 6.0, 0.0]


# Mistakes


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "flyp", "decay": 0.5}, "unknown key objective.decay (options of objective.name = flyp: none)"),
        (
            {"name": "snd", "decay": 0.5},
            "unknown key objective.decay (options of objective.name = snd: weight, reference_every)",
        ),
        (
            {"name": "dive", "dcay": 0.5},
            "unknown key objective.dcay; did you mean objective.decay? (options of objective.name = dive: weight, "
            "reference_every, decay, average_weight, pairwise_weight, mean_gradient)",
        ),
        (
            {"name": "dive", "lambda": 5},
            "unknown key objective.lambda; did you mean objective.weight? (options of objective.name = dive: ",
        ),
        (
            {"name": "vanilla_ft", "probe_epochs": 1},
            "unknown key objective.probe_epochs (options of objective.name = vanilla_ft: head_start)",
        ),
        (
            {"name": "avl", "pairwise_weight": 1.0},
            "objective.pairwise_weight: objective.name = avl fixes it at 0.0; remove it",
        ),
        (
            {"name": "avl", "reference": {"pairwise_weight": 1.0}},
            "objective.reference.pairwise_weight: objective.name = avl fixes it at 0.0; remove it",
        ),
        (
            {"name": "flyp", "weight": 1.0},
            "objective.weight: objective.name = flyp has no reference loss; remove it",
        ),
        (
            {"name": "lp_ft", "reference_every": 2},
            "objective.reference_every: objective.name = lp_ft has no reference loss; remove it",
        ),
        (
            {"name": "dive", "reference": "none", "weight": 1.0},
            "objective.weight: this objective has no reference loss; remove it",
        ),
        ({"name": "dive", "decay": 1.5}, "objective.decay = 1.5: input should be less than 1"),
        ({"name": "dive", "decay": "x"}, 'objective.decay = "x": input should be a valid number'),
        ({"name": "cosine", "average_start": 2}, "objective.average_start = 2: input should be 0 or 1"),
        (
            {"name": "dive", "reference": {"name": "dive", "decay": 1.5}},
            "objective.reference.decay = 1.5: input should be less than 1",
        ),
        (
            {"name": "dive", "reference": {"name": "dive", "dcay": 0.5}},
            "unknown key objective.reference.dcay; did you mean objective.reference.decay? (options of dive: ",
        ),
        (
            {"name": "dive", "reference": {"name": "snd", "decay": 0.5}},
            "unknown key objective.reference.decay (options of snd: none)",
        ),
        (
            {"name": "dive", "reference": {"name": "none", "decay": 0.5}},
            "unknown key objective.reference.decay: none has no options",
        ),
        (
            {"name": "dive", "decay": 0.5, "reference": {"decay": 0.5}},
            "objective.decay and objective.reference.decay set the same option; keep one",
        ),
        (
            {"name": None, "target": "contrastive", "reference": "dive", "decay": 0.5},
            'unknown key objective.decay: set it in objective.reference, as {"name": "dive", "decay": ',
        ),
        (
            {"name": None, "target": "contrastive", "reference": "dive", "wight": 0.5},
            "unknown key objective.wight; did you mean objective.weight? (valid: name, weight, reference_every, ",
        ),
        ({"name": "dvie"}, 'objective.name = "dvie": expected one of '),
        (
            {"name": "dive", "target": "contrastve"},
            f'objective.target.name = "contrastve": expected one of {TARGETS}; did you mean contrastive?',
        ),
        (
            {"name": "dive", "reference": "snde"},
            'objective.reference.name = "snde": expected one of cosine, dive, replay, snd, none; did you mean s',
        ),
        ({"name": "dive", "reference": {"name": 5}}, "objective.reference.name = 5: expected one of cosine, "),
        ({"name": "dive", "target": "none"}, f'objective.target.name = "none": expected one of {TARGETS}'),
        (
            {"name": None},
            f"objective.target is missing: name one of {TARGETS}, or a method in objective.name",
        ),
        ({"name": None, "target": "contrastive"}, "objective.reference is missing: name one of cosine, dive, "),
        (
            {"name": None, "target": {"probe": True}, "reference": "none"},
            f"objective.target.name is missing: name one of {TARGETS}, ",
        ),
        (
            {"name": "flyp", "reference": {"decay": 0.5}},
            "objective.reference.decay needs objective.reference.name: objective.name = flyp has no reference",
        ),
    ],
)
def test_invalid_objective_names_key_and_options(section: dict[str, Any], message: str) -> None:
    assert error_of(**section).startswith(message)


def test_nearest_method_is_suggested() -> None:
    assert error_of(name="flyp_repaly").endswith("; did you mean flyp_replay?")


# Parts from outside


class Margin(TargetLoss):
    """A target loss of this test."""

    name, title = "margin", "margin"

    class Options(Section):
        """One option."""

        margin: float = 0.5
        """The margin."""

    def loss(
        self, outputs: Outputs, labels: Tensor, group: Group = None, teacher: TeacherOutputs | None = None
    ) -> Loss:
        """The sum of the images."""
        return Loss(outputs.image.sum(), {})


class Typo(Margin):
    """A loss with a teacher that does not exist."""

    name, teacher = "typo", "movin"  # type: ignore[assignment]


class Named(Margin):
    """A loss with an option that configs use for its name."""

    name = "named"

    class Options(Margin.Options):
        """An option called name."""

        name: str = "x"
        """Something."""


class NoLoss(ReferenceLoss):
    """A reference loss with the name of none."""

    name, title = "none", "none"


class Other(ReferenceLoss):
    """A reference loss of this test, with an option of the same name."""

    name, title = "other", "other"

    class Options(Margin.Options):
        """The same option."""


def module_of(*parts: type, name: str = "outside", **contents: Any) -> types.ModuleType:
    """A module that defines parts."""
    module = types.ModuleType(name)
    for part in parts:
        copied = type(part.__name__, (part,), {"__module__": name})
        setattr(module, part.__name__, copied)
    vars(module).update(contents)
    return module


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> registry.Table:
    """A copy of the table, which takes the place of the table during the test."""
    copied = registry.Table(*(dict(names) for names in TABLE))
    monkeypatch.setattr(registry, "table", lambda: copied)
    return copied


def preset(name: str, target: str = "margin", reference: str | None = None, **more: Any) -> Preset:
    return Preset(name, name.upper(), "A method.", target, reference, "#000000", **more)


def test_added_parts_and_presets_can_be_chosen(table: registry.Table) -> None:
    registry.add(module_of(Margin, Other, PRESETS=(preset("wide", fixed={"margin": 2.0}), preset("narrow"))))
    assert list(table.presets)[-2:] == ["wide", "narrow"]
    assert registry.title_of(objective(name="wide")) == "WIDE"
    assert registry.target_options(objective(name="narrow")).model_dump() == {"margin": 0.5}
    assert registry.target_options(objective(name="wide")).model_dump() == {"margin": 2.0}
    resolved = registry.resolve(objective(name=None, target={"name": "margin", "margin": 2.0}, reference="none"))
    assert resolved.name == "wide"
    both = registry.resolve(objective(name=None, target="margin", reference={"name": "other", "margin": 3.0}))
    assert both.name is None
    assert registry.resolve(both) == both
    assert "margin" not in TABLE.targets


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (module_of(Margin, Other, PRESETS=(preset("dive"),)), "outside: a method named dive exists already"),
        (module_of(PRESETS=(preset("new", "margn"),)), "method new: no part named margn"),
        (module_of(Margin, PRESETS=(preset("new", "margin", "othr"),)), "method new: no part named othr"),
        (
            module_of(Margin, Other, PRESETS=(preset("new", "margin", "other"),)),
            "method new: two options of one name among margin, margin",
        ),
        (
            module_of(Margin, PRESETS=(preset("new", fixed={"size": 1}),)),
            "method new: fixes or hides size, which no part has",
        ),
        (
            module_of(Margin, PRESETS=(preset("new", hidden=("size",)),)),
            "method new: fixes or hides size, which no part has",
        ),
        (module_of(Typo), "loss typo: teacher = 'movin': expected none, frozen, moving"),
        (module_of(Named), "loss named: an option called name: a config names the loss so; rename it"),
        (module_of(NoLoss), "a reference loss named none: a config says so for no reference loss; rename it"),
        (module_of(TABLE.references["snd"]), "outside: a part named snd exists already"),
        (module_of(TABLE.targets["contrastive"]), "outside: a part named contrastive exists already"),
    ],
)
def test_invalid_module_is_refused_and_adds_nothing(
    table: registry.Table, module: types.ModuleType, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        registry.add(module)
    assert table == TABLE


def test_methods_from_outside_are_not_shipped(table: registry.Table) -> None:
    registry.add(module_of(Margin, Other, PRESETS=(preset("wide"), preset("same", "contrastive"))))
    assert registry.is_shipped(objective(name="dive"))
    assert registry.is_shipped(objective(name=None, target="contrastive", reference="none"))
    assert not registry.is_shipped(objective(name="wide"))
    # Its part is known everywhere, its name is not.
    assert not registry.is_shipped(objective(name="same"))
    assert not registry.is_shipped(objective(name=None, target="contrastive", reference="other"))


def test_module_can_be_added_twice(table: registry.Table) -> None:
    module = module_of(Margin, PRESETS=(preset("new"),))
    registry.add(module)
    registry.add(module)
    assert "margin" in table.targets
