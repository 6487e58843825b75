"""The report of a run: each set before and after training, as a table in text."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dive_fast.evaluation.tables import METRICS, aligned

Kind = Literal["id", "ood", "zero_shot", "probe", "other"]
KINDS: dict[Kind, str] = {"id": "ID", "ood": "OOD", "zero_shot": "zero-shot", "other": "", "probe": "probe"}
"""Kinds of sets in the order of the table, and their names."""
SIMILARITIES = {"rsa": "RSA", "cka": "CKA"}
"""Metrics that compare with the pre-trained model, for which they are 1."""
RECALLS = {"image_to_text_r1": "image to text R@1", "text_to_image_r1": "text to image R@1"}


@dataclass(frozen=True)
class Row:
    """One metric before and after training."""

    name: str
    kind: Kind
    metric: str
    before: float | None
    """A share in [0, 1], or a similarity; None: not measured."""
    after: float
    samples: int
    left_out: int = 0
    data: str | None = None
    """Digest of the contents of the set, or of the pairs."""

    @property
    def is_similarity(self) -> bool:
        """Whether the value is a similarity to the pre-trained model, instead of a share."""
        return self.metric in SIMILARITIES

    @property
    def change(self) -> float | None:
        """The change, in percentage points of a share."""
        if self.before is None:
            return None
        return (self.after - self.before) * (1 if self.is_similarity else 100)

    @property
    def title(self) -> str:
        """The set's name, with its metric unless that is top-1."""
        name = self.name.partition("/")[0] if self.kind == "probe" else self.name
        metric = (SIMILARITIES | RECALLS | METRICS).get(self.metric, self.metric.replace("_", " "))
        return name if self.metric == "top1" else f"{name} ({metric})"

    def shown(self, value: float | None) -> str:
        """A value as text: percent with one decimal, or a similarity with three."""
        if value is None:
            return "-"
        return f"{value:.3f}" if self.is_similarity else f"{100 * value:.1f}"

    def shown_change(self) -> str:
        """The change as text with its sign."""
        if self.change is None:
            return "-"
        text = f"{self.change:+.3f}" if self.is_similarity else f"{self.change:+.1f}"
        return text if float(text) else text.replace("-", "+")


@dataclass(frozen=True)
class Report:
    """The result of a run."""

    run: str
    """Name of the run folder."""
    weights_step: int
    """Step of the exported weights."""
    steps: int
    """Steps of the complete run."""
    method: str
    """Name of the method, or of its two parts."""
    weight: float | None
    """Weight of the reference loss; None without one."""
    seed: int
    rows: tuple[Row, ...]
    title: str = ""
    """Name of the method in tables and figures."""
    selected_on: str | None = None
    """The set that the weights were selected on; None: the last weights."""
    notes: tuple[str, ...] = ()
    """Sentences below the table."""
    projection: str | None = None
    """Name of the method in weight space; None without one."""

    def message(self) -> str:
        """The main result in words: the change of the tuned task, and the largest loss."""
        if not self.rows:
            return ""
        shares = [row for row in self.rows if not row.is_similarity] or list(self.rows)
        first, *others = shares
        parts = [f"{first.title} {_short(first)}"]
        if changed := [row for row in others if row.change is not None]:
            lowest = min(changed, key=lambda row: row.change or 0.0)
            parts.append(f"{lowest.title} {_short(lowest)}")
        unit = " points" if first.change is not None and not first.is_similarity else ""
        return ", ".join(parts) + unit

    def weights(self) -> str:
        """The step of the exported weights in words."""
        chosen = "the last" if self.selected_on is None else f"best on {self.selected_on}"
        return f"weights of step {self.weights_step} of {self.steps}, {chosen}"

    def table(self) -> str:
        """The rows as a Markdown table that is aligned for a terminal."""
        cells = [["set", "before", "after", "change", "samples", "kind"]]
        for row in self.rows:
            samples = f"{row.samples} ({row.left_out} left out)" if row.left_out else str(row.samples)
            values = row.shown(row.before), row.shown(row.after), row.shown_change()
            cells.append([row.title, *values, samples, KINDS[row.kind]])
        return aligned(f"{self.title}: {self.weights()}", cells)

    def text(self) -> str:
        """The table, or a line without one, and the notes."""
        table = self.table() if self.rows else f"{self.title}: {self.weights()}; nothing is measured without sets."
        return "\n".join([table, *self.notes])

    def markdown(self) -> str:
        """As :meth:`text`, with a paragraph for each note."""
        first, *others = self.text().rsplit("\n", len(self.notes)) if self.notes else [self.text()]
        return "\n\n".join([first.rstrip("\n"), *others]) + "\n"

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def _short(row: Row) -> str:
    return row.shown_change() if row.change is not None else row.shown(row.after) + " %" * (not row.is_similarity)


def accuracy_line(accuracies: Mapping[str, float], best: str | None = None) -> str:
    """Accuracies in percent on one line.

    Args:
        best: the set on which these weights are the best so far.
    """
    return ", ".join(
        f"{name} {100 * value:.1f} %{' (best so far)' * (name == best)}" for name, value in accuracies.items()
    )
