"""Parts of data sets that are spread evenly over them."""


def spread(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` of the indices 0 to ``count - 1``, evenly spaced; None: all."""
    number = count if limit is None else min(limit, count)
    return [index * count // number for index in range(number)]
