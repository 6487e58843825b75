"""CAR-FT: its contexts and its divergence against the equations of its docstring, which are a reconstruction."""

from collections.abc import Sequence

import open_clip
import pytest
import torch
from torch import Tensor

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.data.prompt_files import Template
from dive_fast.errors import ConfigError
from dive_fast.kernels.naive import unit
from dive_fast.methods import registry
from dive_fast.methods.car_ft import CarFT
from dive_fast.methods.method import Start, TeacherOutputs
from dive_fast.model.features import Outputs

NAMES, TEMPLATES = ("cat", "dog", "sea lion"), (Template("a {}"), Template("the {} at night"))
EMBEDDED: list[str] = []


def embed(texts: Sequence[str]) -> Tensor:
    """Unit rows that depend on the text."""
    EMBEDDED.extend(texts)
    rows = [torch.randn(6, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
    return unit(torch.stack(rows))


def start(templates: tuple[Template, ...] = TEMPLATES) -> Start:
    EMBEDDED.clear()
    return Start(embed, open_clip.get_tokenizer("ViT-B-16"), 49408, "argmax", NAMES, templates)


def part(**options: float) -> CarFT:
    car_ft = registry.create(ObjectiveConfig(name="car_ft", **options), 6).target_loss
    assert isinstance(car_ft, CarFT)
    return car_ft


def features(seed: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))


OUTPUTS = Outputs(features(0), None, torch.tensor([3.0]), features(1))
LABELS = torch.tensor([0, 3, 1, 5])


def test_loss_is_divergence_of_context_distributions() -> None:
    car_ft, frozen = part(distillation_weight=2.0), unit(features(2))
    car_ft.start(start())
    loss = car_ft.loss(OUTPUTS, LABELS, teacher=TeacherOutputs(frozen, None, torch.tensor([20.0])))
    contexts = []
    for template in TEMPLATES:
        mean = sum(embed([template(name)])[0].double() for name in NAMES) / 3
        contexts.append(mean / mean.norm())
    expected = 0.0
    for image, other in zip(OUTPUTS.image.double(), frozen.double(), strict=True):
        p = torch.softmax(20 * torch.stack([c @ image / image.norm() for c in contexts]), 0)
        p0 = torch.softmax(20 * torch.stack([c @ other for c in contexts]), 0)
        expected += float((p0 * (p0 / p).log()).sum()) / 4
    assert float(loss.metrics["context_loss"]) == pytest.approx(expected, rel=1e-5)
    cross_entropy = torch.nn.functional.cross_entropy(OUTPUTS.logits, LABELS)
    assert float(loss.loss) == pytest.approx(float(cross_entropy) + 2 * expected, rel=1e-5)


def test_equal_images_have_no_divergence() -> None:
    car_ft = part()
    car_ft.start(start())
    teacher = TeacherOutputs(unit(OUTPUTS.image), None, torch.tensor([20.0]))
    assert car_ft.loss(OUTPUTS, LABELS, teacher=teacher).metrics["context_loss"] == 0


def test_weight_zero_is_vanilla_fine_tuning_and_embeds_nothing() -> None:
    car_ft = part(distillation_weight=0.0)
    car_ft.start(start())
    assert not EMBEDDED
    expected = registry.create(ObjectiveConfig(name="vanilla_ft"), 6).target(OUTPUTS, LABELS)
    assert torch.equal(car_ft.loss(OUTPUTS, LABELS).loss, expected.loss)


def test_contexts_are_embedded_once_for_every_template_and_class() -> None:
    part().start(start())
    assert sorted(EMBEDDED) == sorted(template(name) for template in TEMPLATES for name in NAMES)


def test_single_context_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.target.templates: car_ft .* needs at least two"):
        part().start(start(TEMPLATES[:1]))
