"""Mistakes in the options of ``dive-fast evaluate --attack`` are one line, before anything is loaded."""

from typing import Any

import pytest

from dive_fast.commands import evaluate
from dive_fast.evaluation.attacks import attack_options

MODEL = ("--model", "ViT-B-32", "--pretrained", "openai", "--datasets", "pets", "--root", "/no-such-folder")
ATTACK = (*MODEL, "--attack", "apgd-ce")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*MODEL, "--eps", "4"), "--eps goes with --attack"),
        ((*MODEL, "--attack-samples", "4"), "--attack-samples goes with --attack"),
        ((*MODEL, "--norm", "l2"), "--norm goes with --attack"),
        (ATTACK, "--attack needs --eps in 255ths"),
        ((*ATTACK, "--eps", "-1"), "error: eps = -1: expected a finite number of at least 0"),
        ((*ATTACK, "--eps", "4", "inf"), "error: eps = inf"),
        ((*ATTACK, "--eps", "four"), "argument --eps"),
        ((*ATTACK, "--eps", "4", "--norm", "l1"), "argument --norm: invalid choice: 'l1'"),
        ((*ATTACK, "--eps", "4", "--attack-steps", "0"), "argument --attack-steps: '0': expected a number"),
        ((*ATTACK, "--eps", "4", "--compare"), "there are no published results under attack"),
        ((*MODEL, "--attack", "fgsm", "--eps", "4"), "argument --attack: invalid choice: 'fgsm'"),
        (
            (*MODEL, "--attack", "autoattack", "--eps", "4", "--attack-steps", "3"),
            "AutoAttack's numbers of steps are fixed",
        ),
        ((*ATTACK, "--eps", "4"), "no pets found"),
    ],
)
def test_mistake_is_reported_in_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(attack_options, "find_spec", lambda name: None)
    assert exit_code((*MODEL, "--attack", "autoattack", "--eps", "4")) == 2
    assert "pip install 'dive_fast[attacks]'" in capsys.readouterr().err


def exit_code(arguments: tuple[str, ...]) -> Any:
    try:
        return evaluate.main(list(arguments))
    except SystemExit as exit:
        return exit.code
