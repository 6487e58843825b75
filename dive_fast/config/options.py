"""Validation of the options of a method, which stand among other keys of a config."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dive_fast.config.explain import nearest_key, shorten_json
from dive_fast.config.section import KeyedError, Section


def validate_options(
    schema: type[Section],
    options: Mapping[str, Any],
    keys: Mapping[str, str],
    owner: str,
    others: Sequence[str] = (),
) -> Section:
    """The options with their defaults.

    Args:
        keys: the dotted key of the config that sets each option.
        owner: name of the method, for messages.
        others: further names that a mistyped option may stand for.

    Raises:
        KeyedError: an option that the schema lacks, or an invalid value; the message names the key.
    """
    try:
        return schema.model_validate_json(json.dumps(options))
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        mistake = next((each for each in mistakes if each["type"] == "extra_forbidden"), mistakes[0])
        option = str(mistake["loc"][0])
        key = keys[option]
        if mistake["type"] == "extra_forbidden":
            valid = list(schema.model_fields)
            hint = nearest_key(key, [*others, *valid])
            listed = ", ".join(valid) or "none"
            raise KeyedError(key, f"unknown key {key}{hint} (options of {owner}: {listed})") from None
        messages = [each["msg"] for each in mistakes if each["loc"][0] == option]
        expected = " or ".join(message[0].lower() + message[1:] for message in messages)
        raise KeyedError(key, f"{key} = {shorten_json(mistake['input'])}: {expected}") from None
