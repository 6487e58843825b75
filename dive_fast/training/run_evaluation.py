"""Measurements of the pre-trained and the tuned model of a run, on evaluation sets and on pairs."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from dive_fast.config.schema import EvaluateConfig, ReferenceConfig
from dive_fast.errors import UserError
from dive_fast.evaluation.datasets.set_loader import loader_of, remark_on_loaders
from dive_fast.evaluation.evaluator import identities
from dive_fast.evaluation.feature_identity import features_identity
from dive_fast.evaluation.geometry.embed import EmbeddedPairs, open_pairs
from dive_fast.evaluation.geometry.measures import GeometryError
from dive_fast.evaluation.text_features import KeptTokens
from dive_fast.evaluation.zero_shot import Measured, measure_sets, report_left_out, values
from dive_fast.identity import Identity
from dive_fast.model.head import Head
from dive_fast.model.towers import Towers, tokenizer_of
from dive_fast.training.evaluation_towers import EvaluationTowers
from dive_fast.training.forgetting_probe import BEFORE, GEOMETRY, PAIRS, PROBE, PairMeasure
from dive_fast.training.measurements import Measurements
from dive_fast.training.setup import Run


class Results(NamedTuple):
    """Measurements of one model."""

    sets: dict[str, Measured]
    """Metrics of each evaluation set."""
    pairs: dict[str, dict[str, float]]
    """Metrics of :class:`PairMeasure` by its name."""
    data: Mapping[str, str] = MappingProxyType({})
    """Digests of the contents of sets and pairs by name; only of the final model, on rank 0."""

    def metrics(self, options: EvaluateConfig) -> dict[str, float]:
        """Values by name, as in ``metrics.jsonl``; not those of the model before training."""
        metrics = {f"accuracy/{name}": value for name, value in values(self.sets, options.sets).items()}
        for name, results in self.pairs.items():
            metrics |= {f"{name}/{key}": value for key, value in results.items() if _is_of_tuned(key)}
        return metrics


def _is_of_tuned(key: str) -> bool:
    return key != PAIRS and not key.startswith(BEFORE)


class RunEvaluation:
    """Measures the models of a run by the same code before, during and after training; all ranks call each method.

    A run draws the same random numbers with and without evaluations.
    """

    def __init__(self, run: Run) -> None:
        """Measures nothing yet."""
        options = run.config.evaluate
        self._run, self._options = run, options
        self.tokenizer = KeptTokens(tokenizer_of(run.config.model))
        """Keeps the tokens of all prompts and captions for the next evaluation."""
        self._towers: EvaluationTowers | None = None
        self._store = Measurements(run.folder, run.ranks)
        self._pairs: dict[str, PairMeasure] | None = None
        self._identity_before: Identity | None = None
        self.before: dict[str, Measured] = {}
        """Metrics of the pre-trained model, once they are measured; empty without ``evaluate.baseline``."""

    def measure_before(self, embeds_pairs: bool) -> None:
        """Measures the pre-trained model, unless the run folder has the values.

        Args:
            embeds_pairs: whether pairs are embedded now, for later comparisons.
        """
        if self._identity_before is not None or not (self._options.sets or self._measures()):
            return
        with torch.random.fork_rng(devices=[]), self.towers().pretrained() as towers:
            self._identity_before = self._identity(towers)
            if self._options.baseline:
                self.before = self._measure_stored(towers, None, self._identity_before)
            if embeds_pairs:
                for measure in self._measures().values():
                    measure.before = measure.embed(towers)

    def measure_during(self, options: EvaluateConfig, exported: Path | None) -> Results:
        """Measures the present weights on the sets and pairs of ``options``.

        Args:
            exported: folder of the weights to measure; None measures the engine's.
        """
        geometry = {} if options.geometry is None else {GEOMETRY: self._measures()[GEOMETRY]}
        if not options.sets and not geometry:
            return Results({}, {})
        run = self._run
        opened = {name: run.evaluation_sets[name] for name in options.sets}
        with torch.random.fork_rng(devices=[]):
            with self._weights(exported) as (towers, head):
                measured = measure_sets(towers, self.tokenizer, options, opened, run.ranks, head)
                after = {name: measure.embed(towers) for name, measure in geometry.items()}
            report_left_out(measured, run.ranks)
            return Results(measured, self._compare(after))

    def measure_after(self, exported: Path | None) -> Results:
        """Measures the final weights on all sets and pairs, unless the run folder has the values.

        Args:
            exported: as for :meth:`measure_during`.
        """
        measures = self._measures()
        if not self._options.sets and not measures:
            return Results({}, {})
        self.measure_before(embeds_pairs=False)
        stored: dict[str, dict[str, float]] = {}
        after: dict[str, EmbeddedPairs] = {}
        with torch.random.fork_rng(devices=[]):
            with self._weights(exported) as (towers, head):
                identity = self._identity(towers)
                measured = self._measure_stored(towers, head, identity)
                pair_identities = self._pair_identities(identity)
                for name, measure in measures.items():
                    if (known := self._store.find_values(pair_identities[name])) is not None:
                        stored[name] = known
                    else:
                        after[name] = measure.embed(towers)
            compared = self._compare(after)
        report_left_out(measured, self._run.ranks)
        for name, metrics in compared.items():
            self._store.add_values(pair_identities[name], metrics)
        self._store.remove_unused()
        pairs = {name: (stored | compared)[name] for name in measures if name in stored | compared}
        return Results(measured, pairs, self._data())

    def _measures(self) -> dict[str, PairMeasure]:
        """The pairs to measure: those of ``evaluate.geometry``, and the forgetting probe."""
        if self._pairs is None:
            run, options = self._run, self._options
            common = run.ranks, options
            self._pairs = {}
            if run.probe is not None:
                self._pairs[PROBE] = PairMeasure(PROBE, run.probe, len(run.held_out.samples), *common)
            if (geometry := options.geometry) is not None:
                data = ReferenceConfig(format=geometry.format, path=geometry.path, image_root=geometry.image_root)
                samples = open_pairs(run.config.model, data, run.engine.towers, run.geometry_source)
                self._pairs[GEOMETRY] = PairMeasure(GEOMETRY, samples, geometry.pairs, *common)
        return self._pairs

    def _measure_stored(self, towers: Towers, head: Head | None, features: Identity) -> dict[str, Measured]:
        """The metrics of all sets: stored ones, or measured and stored now."""
        run, options = self._run, self._options
        of_set: Mapping[str, Identity] = {}
        with run.ranks.raise_on_all(UserError):
            if run.ranks.is_main:
                loaders = {
                    name: loader_of(options.loader, data, towers.preprocess).name
                    for name, data in run.evaluation_sets.items()
                }
                of_set = identities(features, run.evaluation_sets, head, float(towers.scale().detach()), loaders)
        results = {}
        for name in options.sets:
            identity = of_set.get(name, {})
            if (measured := self._store.find_set(identity)) is None:
                opened = {name: run.evaluation_sets[name]}
                measured = measure_sets(towers, self.tokenizer, options, opened, run.ranks, head)[name]
                self._store.add_set(identity, measured)
            results[name] = measured
        return results

    def _compare(self, after: Mapping[str, EmbeddedPairs]) -> dict[str, dict[str, float]]:
        """The metrics of tuned embeddings, compared with the pre-trained ones."""
        measures = self._measures()
        missing = [measures[name] for name in after if measures[name].before is None]
        if missing:
            with self.towers().pretrained() as towers:
                for measure in missing:
                    measure.before = measure.embed(towers)
        results = {}
        for name, embedded in after.items():
            try:
                results[name] = measures[name].compare(embedded)
            except GeometryError as error:
                # Collapsed embeddings are reported, but do not end the run.
                self._run.ranks.print(f"{name}: {error}")
        return results

    def _identity(self, towers: Towers) -> Identity:
        """The identity of a model's features on rank 0; empty on the others."""
        ranks = self._run.ranks
        return features_identity(towers, self.tokenizer, ranks.device) if ranks.is_main else {}

    def _pair_identities(self, after: Identity) -> dict[str, Identity]:
        """The identity of each comparison on rank 0; empty on the others."""
        measures, before, ranks = self._measures(), self._identity_before, self._run.ranks
        comparisons: dict[str, Identity] = {name: {} for name in measures}
        with ranks.raise_on_all(UserError):
            if ranks.is_main:
                for name, measure in measures.items():
                    comparisons[name] = {"before": before, "after": after} | measure.identity()
        return comparisons

    def _data(self) -> dict[str, str]:
        """Digests of the contents of all sets and pairs on rank 0, where their identities had them computed."""
        if not self._run.ranks.is_main:
            return {}
        data = {name: opened.source.digest() for name, opened in self._run.evaluation_sets.items()}
        return data | {name: measure.data() for name, measure in self._measures().items()}

    def towers(self) -> EvaluationTowers:
        """The towers of all evaluations of the run, built at the first call; draws random numbers then."""
        if self._towers is None:
            run = self._run
            self._towers = EvaluationTowers(run.config.model, run.engine)
            preprocess = run.engine.towers.preprocess
            remark_on_loaders(self._options.loader, run.evaluation_sets, preprocess, run.ranks)
        return self._towers

    def _weights(self, exported: Path | None) -> AbstractContextManager[tuple[Towers, Head | None]]:
        towers = self.towers()
        return towers.trained(self._run.class_names) if exported is None else towers.exported(exported)
