"""Measures how far test sets are from a training set, for images, texts and pairs.

``dive-fast shift --config vitb16_dive.json --fit data.target --sets imagenet-r sketch=/data/sketch``
fits a Gaussian to the embeddings of the fitted set, and reports the mean Mahalanobis distance of each set, by the
pre-trained and by the tuned model. ``--model ViT-B-16 --pretrained openai`` measures one of open_clip's models
instead of a config's. A set is written ``[NAME=]SET[,format=...][,text=...][,images=...][,annotations=...]``: a
path, ``data.target``, ``data.reference``, a set of ``evaluate.sets``, or with ``--root`` a known data set.
See docs/shift.md.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dive_fast.commands import cli

if TYPE_CHECKING:
    from dive_fast.config.schema import Config, ModelConfig

logger = logging.getLogger(__name__)

RESULTS = Path("runs/shift")
"""Default output folder with --model."""
PRETRAINED = Path("pretrained")
"""Value of --after for no tuned model."""


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; a user's mistake becomes one line and exit code 2."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    cli.check_model_options(parser, options, "name a run by --config, or a model by --model")
    if options.near > options.far:
        parser.error("--near is larger than --far")

    # Only pydantic is imported so far, so that a typo is reported at once.
    from dive_fast.errors import ConfigError, UserError
    from dive_fast.evaluation.early_checks import check_output
    from dive_fast.evaluation.shift import shift_sets
    from dive_fast.model.model_names import check_name

    def check(model: "ModelConfig", config: "Config | None") -> None:
        _checkpoints(options, config)
        check_output(_folder(options, config))
        check_name(model, weights=options.before is None)
        for each in sets:
            shift_sets.check(each, config, options.root)

    try:
        written = [options.fit, *([] if options.held_out is None else [options.held_out]), *options.sets]
        sets = shift_sets.parse_all(written)
        if options.held_out is None and any(each.name == "held-out" for each in sets):
            raise ConfigError("held-out is the name of a part of the fitted set; name the set otherwise")
        config, model, defaults = cli.config_or_model(options, check)
        from dive_fast.distributed import join, use_cpu_without_gpu

        use_cpu_without_gpu()
        from dive_fast.evaluation.shift import measure_shift, set_accuracy, shift_report
        from dive_fast.evaluation.shift.correlations import Thresholds
        from dive_fast.evaluation.shift.gaussian import FitOptions
        from dive_fast.model import towers

        towers.check(model, weights=options.before is None)
        ranks = join()
    except UserError as error:
        return cli.report_error(error, options)
    folder = _folder(options, config)
    before, after = _checkpoints(options, config)
    if after is None and config is not None and options.after is None:
        ranks.print(f"{folder} has no tuned model yet: only the pre-trained one is measured")
    updates = {"batch_size": options.batch_size, "workers": options.workers}
    evaluate = defaults.model_copy(update={name: value for name, value in updates.items() if value is not None})
    concepts = tuple(dict.fromkeys(options.concepts))
    settings = measure_shift.ShiftOptions(
        FitOptions(options.cut, options.shrinkage),
        concepts,
        options.joint,
        options.normalize,
        options.hold_out_every,
        options.limit,
    )
    thresholds = Thresholds(options.near, options.far)
    needs = {half: half in concepts or "joint" in concepts for half in ("image", "text")}
    try:
        opened = [shift_sets.open_set(each, config, options.root, needs, ranks) for each in sets]
        with ranks.raise_on_all(UserError):
            if ranks.is_main:
                for each in opened:
                    each.source.report_skipped(each.name)
                for line in shift_sets.remarks_on_overlap(opened[0], opened[1:]):
                    logger.warning("%s", line)
        fitted, *others = opened
        held_out = None if options.held_out is None else others.pop(0)
        models = measure_shift.measure_all(
            measure_shift.Models(model, before, after, options.image_encoder, options.text_encoder),
            fitted,
            held_out,
            others,
            ranks,
            evaluate,
            options.features or folder / "shift_features",
            settings,
        )
        if not ranks.is_main:
            ranks.leave()
            return 0
        accuracies: set_accuracy.Accuracies = {}
        digests = {each.label: each.digest for each in models if each.label != measure_shift.UNIMODAL}
        locations = {models[0].held_out.name: "held-out"} | {each.name: each.location for each in opened[1:]}
        for path in options.accuracy or []:
            for label, values in set_accuracy.read_accuracies(path, digests, locations).items():
                accuracies.setdefault(label, {}).update(values)
        rows = shift_report.rows_of(models, thresholds, accuracies)
        correlations = shift_report.correlations_of(models, rows)
        keys = {each.name: each.source.samples.key for each in opened}
        keys.setdefault(models[0].held_out.name, fitted.source.samples.key)
        about = {
            "model": model.name,
            "image_encoder": options.image_encoder,
            "text_encoder": options.text_encoder,
            "fit": options.fit,
            "held_out": options.held_out,
            "sets": options.sets,
            "joint": settings.joint,
            "normalize": settings.normalize,
            "hold_out_every": settings.held_out_every,
            "limit": settings.limit,
            "cut": settings.fit.cut,
            "shrinkage": settings.fit.shrinkage,
            "near": thresholds.near,
            "far": thresholds.far,
        }
        files = shift_report.write(models, rows, correlations, about, keys, thresholds, folder)
    except UserError as error:
        return cli.report_error(error, options)
    print(shift_report.as_markdown(rows, correlations, thresholds))
    for file in files:
        print(file)
    ranks.leave()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, "evaluate.batch_size=64", required=False)
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="open_clip's name of a model, instead of a config")
    model.add_argument("--pretrained", help="open_clip's tag, or a file, with --model")
    model.add_argument(
        "--before", type=Path, metavar="WEIGHTS", help="exported weights; default: the pre-trained model"
    )
    model.add_argument(
        "--after",
        type=Path,
        metavar="WEIGHTS",
        help="exported weights of a tuned model, measured too; default: the run's model.safetensors if it exists; "
        "`pretrained`: none",
    )
    model.add_argument(
        "--image-encoder",
        metavar="NAME",
        help="image transformer of timm that is measured too: its name, hf-hub:owner/repo, or a folder",
    )
    model.add_argument(
        "--text-encoder",
        metavar="NAME",
        help="text model of transformers that is measured too: a hub id, or a folder",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--fit", metavar="SET", required=True, help="the set that the Gaussian is fitted to")
    data.add_argument("--sets", nargs="+", metavar="SET", required=True, help="the sets that are compared with it")
    data.add_argument(
        "--held-out", metavar="SET", help="unseen data like the fitted set; default: a part of it is not fitted"
    )
    data.add_argument(
        "--hold-out-every",
        type=cli.count(2),
        metavar="K",
        default=10,
        help="without --held-out: one of K images of the fitted set is held out; default: %(default)s",
    )
    data.add_argument("--root", help="folder with known data sets, or a pattern, e.g. /data/{dataset}")
    data.add_argument(
        "--limit", type=cli.count(1), metavar="N", help="samples of each set, spread evenly over it; default: all"
    )
    data.add_argument(
        "--accuracy",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="accuracy on the sets: results.jsonl of an evaluation, or JSON or CSV (docs/shift.md)",
    )
    measure = parser.add_argument_group("measure")
    measure.add_argument(
        "--concepts",
        nargs="+",
        choices=("image", "text", "joint"),
        default=["image", "text", "joint"],
        help="embeddings that are measured; default: all that the fitted set has",
    )
    measure.add_argument(
        "--joint",
        choices=("mean", "concatenation"),
        default="mean",
        help="joint embedding of the unit rows of image and text; default: %(default)s",
    )
    measure.add_argument("--normalize", action="store_true", help="make image and text features unit rows")
    measure.add_argument(
        "--cut",
        type=_share(0, 1),
        default=1e-10,
        metavar="SHARE",
        help="leave out directions with at most this share of the largest variance; default: %(default)s",
    )
    measure.add_argument(
        "--shrinkage",
        type=_shrinkage,
        metavar="RHO",
        help="share of a multiple of I in the covariance, or `ledoit-wolf`; default: none, which needs 20 samples "
        "per dimension",
    )
    groups = "mean distance relative to that of held-out samples from which a set is"
    measure.add_argument("--near", type=_share(0), default=1.02, help=f"{groups} near; default: %(default)s")
    measure.add_argument("--far", type=_share(0), default=1.1, help=f"{groups} far; default: %(default)s")
    parser.add_argument("--batch-size", type=cli.count(1), help="samples encoded at once on each rank")
    parser.add_argument("--workers", type=cli.count(0), help="loader processes on each rank")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="output folder; default: the run folder, or runs/shift"
    )
    parser.add_argument(
        "--features",
        type=Path,
        metavar="FOLDER",
        help="folder of the embeddings, which another measurement reuses; default: shift_features in the output",
    )
    return parser


def _share(low: float, high: float = float("inf")) -> Callable[[str], float]:
    """Argument type for a finite number in [low, high)."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number from {low:g} to below {high:g}")
        return value

    return parse


def _shrinkage(text: str) -> "float | str":
    if text == "ledoit-wolf":
        return text
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected ledoit-wolf, or a number above 0, at most 1")
    return value


def _folder(options: argparse.Namespace, config: "Config | None") -> Path:
    if options.output is not None:
        return Path(options.output)
    return RESULTS if config is None else cli.run_folder(config.train.output, options.config)


def _checkpoints(options: argparse.Namespace, config: "Config | None") -> tuple[Path | None, Path | None]:
    """The weights before and after; None: the pre-trained ones, and no tuned model.

    Raises:
        ConfigError: weights that are named do not exist.
    """
    from dive_fast.evaluation.early_checks import MODEL, find_weights

    run = RESULTS if config is None else cli.run_folder(config.train.output, options.config)
    before = None if options.before is None else find_weights(options.before, "--before", run)
    if options.after == PRETRAINED or (options.after is None and (config is None or not (run / MODEL).is_file())):
        return before, None
    return before, find_weights(options.after, "--after", run)
