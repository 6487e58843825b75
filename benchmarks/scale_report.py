"""Laws and report of :mod:`scale`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

PREDICTED = 12_000_000
"""Number of samples for which costs are predicted by the laws."""
Row = dict[str, Any]


class Law(NamedTuple):
    """``a + b N^p``, with the largest relative error over the points it was fitted to."""

    a: float
    b: float
    p: float
    error: float

    def at(self, count: float) -> float:
        """The cost of ``count`` samples."""
        return self.a + self.b * count**self.p


def fit(costs: dict[int, float]) -> Law | None:
    """The law with the least squares of relative errors, ``a >= 0`` and ``0 <= p <= 2``; None for a single size.

    Two sizes decide ``p`` only with ``a = 0``. Costs of zero or less are left out.
    """
    points = {count: cost for count, cost in costs.items() if cost > 0}
    if len(points) < 2:
        return None
    fitted = [_fit(points, step / 100) for step in range(201)]
    return min(fitted, key=lambda each: (round(each[0], 9), each[1].p))[1]


def _fit(points: dict[int, float], p: float) -> tuple[float, Law]:
    """The law with this exponent and its sum of squared relative errors."""
    # Columns of a linear problem whose right side is 1: both are divided by the costs.
    ones = [1 / cost for cost in points.values()]
    powers = [count**p / cost for count, cost in points.items()]
    oo, pp = sum(x * x for x in ones), sum(x * x for x in powers)
    op, o, q = sum(x * y for x, y in zip(ones, powers, strict=True)), sum(ones), sum(powers)
    candidates = [(0.0, q / pp)]
    determinant = oo * pp - op * op
    if len(points) > 2 and determinant > 1e-12 * oo * pp:
        candidates += [((o * pp - q * op) / determinant, (q * oo - o * op) / determinant), (o / oo, 0.0)]
    fitted = []
    for a, b in candidates:
        if a >= 0 and b >= 0:
            errors = [a * x + b * y - 1 for x, y in zip(ones, powers, strict=True)]
            law = Law(a, b, p if b > 0 else 0.0, max(map(abs, errors)))
            fitted.append((sum(error * error for error in errors), law))
    return min(fitted, key=lambda each: each[0])


def key(row: Row) -> tuple[Any, ...]:
    """Everything that says what a row measures."""
    return tuple(row.get(name) for name in ("part", "kind", "count", "start", "read", "step", "ranks"))


class Run:
    """The rows of a run, by what they measure."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.about = {name: value for name, value in results.items() if name not in ("rows", "before")}
        self.rows: list[Row] = results["rows"]

    def costs(self, value: str, **wanted: Any) -> dict[int, float]:
        """A figure by the number of samples, of the rows with these values."""
        rows = (row for row in self.rows if all(row.get(name) == each for name, each in wanted.items()))
        return {row["count"]: row[value] for row in rows if row.get(value) is not None}

    def kinds(self, part: str) -> list[str]:
        """Kinds of sets that a part was measured of, in order."""
        return list(dict.fromkeys(row["kind"] for row in self.rows if row["part"] == part))

    def values(self, name: str, **wanted: Any) -> list[Any]:
        """Distinct values of a field, of the rows with these values."""
        rows = (row for row in self.rows if all(row.get(each) == value for each, value in wanted.items()))
        return list(dict.fromkeys(row[name] for row in rows if row.get(name) is not None))

    @property
    def sizes(self) -> list[int]:
        """Numbers of samples of the sets."""
        return sorted({row["count"] for row in self.rows if row["part"] != "growth"})


def report(results: dict[str, Any]) -> str:
    """Markdown of all figures, with those of an earlier run under ``before`` next to them."""
    now = Run(results)
    before = Run(results["before"]) if "before" in results else None
    lines = [
        "# Data sets as they grow",
        "",
        f"By `benchmarks/scale.py` at commit {_commits(now)}, on {_machine(now.about)}.",
        "CPU seconds are those of one start, without imports; other processes used the machine too. "
        "Synthetic sets of small images, in the page cache. N counts samples; for `csv, 80 rows an image`, rows.",
    ]
    if before is not None:
        machine = _machine(before.about)
        lines += ["", f'"Before" is commit {_commits(before)}, measured by the same command on {machine}.']
    lines += ["", *_opening(now, before), *_memory(now, before), *_ranks(now, before), *_workers(now, before)]
    lines += [*_first(now, before), *_labels(now, before), *_step(now, before), *_stream(now, before)]
    lines += [*_growth(now, before)]
    return "\n".join(lines) + "\n"


def _commits(run: Run) -> str:
    """The commits that the rows were measured at."""
    return ", ".join(dict.fromkeys(str(row["commit"]) for row in run.rows))


def _machine(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    return f"{about['cores']} cores of {about['cpu']} (Python {about['python']}, {versions})"


def _opening(now: Run, before: Run | None) -> list[str]:
    rows = []
    for kind in now.kinds("open"):
        first = now.costs("cpu", part="open", kind=kind, start="first")
        second = now.costs("cpu", part="open", kind=kind, start="second")
        old = {} if before is None else before.costs("cpu", part="open", kind=kind, start="first")
        cells = [_seconds(first.get(size)) for size in now.sizes]
        law = fit(first)
        largest = max(second, default=0)
        rows.append(
            [
                kind,
                *cells,
                _law(law),
                # Two sizes decide the exponent, and with it a prediction, by their noise.
                "" if law is None or len(first) < 3 else _seconds(law.at(PREDICTED)),
                "" if not second else f"{_seconds(second[largest])} at {_count(largest)}",
                _compared(old, first),
            ]
        )
    sizes = [_count(size) for size in now.sizes]
    header = ["set", *sizes, "law of the first start", f"predicted at {_count(PREDICTED)}", "second start"]
    return _section("Opening a set, CPU seconds", [*header, "before / now"], rows)


def _memory(now: Run, before: Run | None) -> list[str]:
    rows = []
    for kind in now.kinds("open"):
        first = {"part": "open", "kind": kind, "start": "first"}
        kept, peak = (now.costs(name, **first) for name in ("kept_dirty", "node_peak"))
        second = now.costs("kept_rss", part="open", kind=kind, start="second")
        old = {} if before is None else before.costs("kept_dirty", **first)
        largest = max(kept)
        shown = [_megabytes(kept.get(size)) for size in now.sizes]
        rows.append(
            [
                kind,
                *shown,
                f"{max(0, kept[largest]) / largest:.0f}",
                f"{_megabytes(peak[largest])} at {_count(largest)}",
                "" if not second else _megabytes(second[max(second)]),
                _compared(old, kept),
            ]
        )
    header = [
        "set",
        *map(_count, now.sizes),
        "bytes a sample",
        "peak of the first start",
        "RSS of the second start",
    ]
    return _section("Memory of a process that has opened a set, MB of its own", [*header, "before / now"], rows)


def _ranks(now: Run, before: Run | None) -> list[str]:
    rows = []
    for kind in now.kinds("ranks"):
        for start in ("first", "second"):
            wanted = {"part": "ranks", "kind": kind, "start": start}
            cpu, wall, node = (now.costs(name, **wanted) for name in ("cpu", "wall", "node_kept"))
            old = [{} if before is None else before.costs(name, **wanted) for name in ("cpu", "node_kept")]
            for size in sorted(cpu):
                cells = [_seconds(cpu[size]), _seconds(wall[size]), _megabytes(node[size])]
                cells += [_seconds(old[0].get(size)), _megabytes(old[1].get(size))]
                rows.append([kind, _count(size), start, *cells])
    ranks = ", ".join(map(str, now.values("ranks", part="ranks")))
    header = ["set", "N", "start", "CPU s, all", "wall s", "MB of the node", "CPU s before", "MB before"]
    return _section(f"{ranks} ranks of a node that open a set at the same time", header, rows)


def _workers(now: Run, before: Run | None) -> list[str]:
    rows = []
    counts = now.values("read", part="workers")
    for kind in now.kinds("workers"):
        size = max(now.costs("uss", part="workers", kind=kind))
        for name, run in (("", now), (", before", before)):
            if run is None:
                continue
            figures = [run.costs("uss", part="workers", kind=kind, read=count).get(size) for count in counts]
            if any(value is not None for value in figures):
                dirty = run.costs("dirty", part="workers", kind=kind, read=counts[-1]).get(size)
                rows.append([kind + name, _count(size), *map(_megabytes, figures), _megabytes(dirty)])
    header = ["set", "N", *(f"{count:,}" for count in counts), "of these, not pages of files"]
    return _section("USS of a worker process after that many samples, MB", header, rows)


def _first(now: Run, before: Run | None) -> list[str]:
    rows = []
    for kind in now.kinds("first"):
        for start in now.values("start", part="first", kind=kind):
            wanted = {"part": "first", "kind": kind, "start": start}
            costs = now.costs("wall", **wanted)
            old = {} if before is None else before.costs("wall", **wanted)
            rows.append([kind, start, *(_seconds(costs.get(size)) for size in now.sizes), _compared(old, costs)])
    header = ["set", "start", *map(_count, now.sizes), "before / now"]
    return _section("Time to the first sample, seconds", header, rows)


def _labels(now: Run, before: Run | None) -> list[str]:
    return _steps("labels", "Passes over a labelled set, CPU ms", now, before)


def _step(now: Run, before: Run | None) -> list[str]:
    return _steps("step", "Parts of a step of 512 samples on the host, CPU ms", now, before)


def _stream(now: Run, before: Run | None) -> list[str]:
    lines = _steps("stream", "The order of a stream of tars in batches of 512, CPU ms", now, before)
    peaks = now.costs("peak", part="stream")
    if peaks:
        shown = ", ".join(f"{_megabytes(value)} at {_count(count)}" for count, value in peaks.items())
        lines += [f"Peak of its memory over an epoch, MB: {shown}.", ""]
    return lines


def _steps(part: str, title: str, now: Run, before: Run | None) -> list[str]:
    rows = []
    for kind in now.kinds(part):
        for step in now.values("step", part=part, kind=kind):
            wanted = {"part": part, "kind": kind, "step": step}
            costs = now.costs("cpu", **wanted)
            old = {} if before is None else before.costs("cpu", **wanted)
            shown = [_milliseconds(costs.get(size)) for size in now.sizes]
            rows.append([kind, step, *shown, _law(fit(costs)), _compared(old, costs)])
    return _section(title, ["set", "part", *map(_count, now.sizes), "law", "before / now"], rows)


def _growth(now: Run, before: Run | None) -> list[str]:
    rows = []
    for kind in now.kinds("growth"):
        costs, peaks = (now.costs(name, part="growth", kind=kind) for name in ("cpu", "peak"))
        old = {} if before is None else before.costs("cpu", part="growth", kind=kind)
        shown = ", ".join(f"{count:,}: {_seconds(cost)}" for count, cost in costs.items())
        rows.append([kind, shown, _law(fit(costs)), _megabytes(peaks[max(peaks)]), _compared(old, costs)])
    header = ["work", "CPU seconds by length", "law", "MB at the largest", "before / now"]
    return _section("Other work that grows", header, rows)


def _section(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A heading and a table; nothing without rows."""
    rows = list(rows)
    if not rows:
        return []
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [f"## {title}", "", lines[0], "|---" * len(header) + "|", *lines[1:], ""]


def _compared(old: dict[int, float], new: dict[int, float]) -> str:
    """The ratio of a former cost to the current one, at the largest size of both."""
    sizes = [size for size in old if new.get(size, 0) > 0]
    if not sizes:
        return ""
    size = max(sizes)
    return f"{old[size] / new[size]:.3g} at {_count(size)}"


def _law(law: Law | None) -> str:
    if law is None:
        return ""
    if law.p < 0.05:
        return f"{law.a + law.b:.2g}, constant"
    constant = f"{law.a:.2g} + " if law.a > 0.02 * law.b else ""
    return f"{constant}{law.b:.2g} N^{law.p:.2f}"


def _of(scale: float, digits: int = 2) -> Callable[[float | None], str]:
    return lambda value: (
        ""
        if value is None
        else f"{value * scale:.{digits}g}"
        if abs(value * scale) < 100
        else f"{value * scale:,.0f}"
    )


_seconds, _milliseconds, _megabytes = _of(1), _of(1e3), _of(1e-6)


def _count(size: int) -> str:
    """A number of samples in short: 10 k, 3 M."""
    for unit, name in ((1_000_000, " M"), (1000, " k")):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{name}"
    return f"{size:,}"
