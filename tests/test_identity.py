"""Identities: differences are named by key with both values, and digests are equal only for equal values."""

from typing import Any

import pytest

from dive_fast.identity import Difference, differences, digest


@pytest.mark.parametrize(
    ("stored", "current", "expected"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 1}}, []),
        ({"a": (1, 2)}, {"a": [1, 2]}, []),
        ({"train": {"seed": 0}}, {"train": {"seed": 7}}, ["train.seed: 0 there, 7 here"]),
        ({"a": 1}, {"a": 1.0}, ["a: 1 there, 1.0 here"]),
        ({"a": True}, {"a": 1}, ["a: true there, 1 here"]),
        ({}, {"a": 0}, ["a: nothing there, 0 here"]),
        ({"a": 0}, {}, ["a: 0 there, nothing here"]),
        ({"a": {"b": 1}}, {"a": 2}, ['a: {"b": 1} there, 2 here']),
        ({"a": "0" * 64}, {"a": "f" * 64}, [f"a: {'0' * 12} there, {'f' * 12} here"]),
        ({"n": ["grass", "sky"]}, {"n": ["sky", "grass"]}, ['n: entry 0 is "grass" there, "sky" here']),
        ({"n": ["grass"]}, {"n": ["grass", "sky"]}, ["n: 1 entries there, 2 here"]),
    ],
)
def test_differences_name_key_and_both_values(
    stored: dict[str, Any], current: dict[str, Any], expected: list[str]
) -> None:
    assert [str(difference) for difference in differences(stored, current)] == expected
    assert (digest(stored) == digest(current)) == (not expected)


def test_long_values_are_shortened_to_the_difference() -> None:
    one, other = "a" * 500 + "b" + "c" * 500, "a" * 500 + "d" + "c" * 500
    message = str(Difference("key", one, other))
    assert len(message) < 200
    assert "ab" in message
    assert "ad" in message


def test_digest_does_not_depend_on_key_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [2, 2]})
    with pytest.raises(ValueError, match="Out of range"):
        digest({"a": float("nan")})
