"""Measures a model on image sets: a run's, ``python launch/evaluate.py --config vitb16_dive.json``, or any other.

``python launch/evaluate.py --model ViT-B-16-quickgelu --pretrained openai --suite imagenet_ood --root /data``
measures one of open_clip's. On several GPUs: ``deepspeed launch/evaluate.py ...``. See docs/evaluation.md.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import cli

if TYPE_CHECKING:
    from dive_fast.config.schema import Config, ModelConfig


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Parses, calls, and turns a user's mistake into one line and exit code 2."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    if (options.config is None) == (options.model is None):
        parser.error("name a run by --config, or a model by --model")
    if options.model is not None and options.overrides:
        parser.error(f"{options.overrides[0]}: overrides go with --config")
    if options.config is not None and options.pretrained is not None:
        parser.error("--pretrained goes with --model; the config names its own")
    wanted = [*(options.suite or []), *(options.datasets or [])]
    if wanted and options.root is None:
        parser.error("--suite and --datasets need --root, e.g. --root /data/{dataset}")
    if not wanted and (options.class_names or options.templates):
        parser.error("--class-names and --templates go with --suite or --datasets")
    if not wanted and (options.config is None or options.root is not None):
        parser.error("name what to measure on by --suite or --datasets")

    # Only pydantic so far: a typo is told at once.
    from dive_fast.config.schema import EvaluateConfig, EvaluationSet, ModelConfig
    from dive_fast.errors import ConfigError, UserError
    from dive_fast.methods.run_config import load_run_config

    try:
        config = (
            load_run_config(options.config, options.overrides, cli.CONFIGS) if options.config is not None else None
        )
        model = (
            config.model if config is not None else ModelConfig(name=options.model, pretrained=options.pretrained)
        )
        defaults = config.evaluate if config is not None else EvaluateConfig()
        weights = _weights(options, config)
        from dive_fast.checkpoint.load_weights import head_of, load_into
        from dive_fast.distributed import join
        from dive_fast.evaluate import evaluator as measure
        from dive_fast.evaluate.datasets import catalog as suites
        from dive_fast.evaluate.early_checks import check_output
        from dive_fast.evaluate.results import Results, as_markdown
        from dive_fast.model import head as heads
        from dive_fast.model import towers

        sets: dict[str, EvaluationSet] = {
            name: EvaluationSet(
                path=options.root,
                dataset=name,
                class_names=options.class_names,
                templates=options.templates,
            )
            for name in suites.expand(wanted)
        } or defaults.sets
        towers.check(model, weights=weights is None)
        if not sets:
            raise ConfigError("evaluate.sets names no set; name some there, or by --suite and --root")

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        ranks = join()
    except UserError as error:
        return cli.report_error(error, options)
    head_file = _head(options, weights)
    if weights is None and options.head is None and (unused := _head_of_folder(model)) is not None:
        ranks.print(f"{model.name} has a trained head, which is not measured; --head {unused} measures it")
    precision = options.precision or (config.train.precision if config is not None else "fp32")
    folder = options.output or _folder(options, config)
    how = measure.Options(
        options.label or _label(options, model, weights),
        precision,
        options.batch_size or defaults.batch_size,
        defaults.workers if options.workers is None else options.workers,
        options.classifiers or folder / "classifiers",
        options.again,
    )
    try:
        with ranks.raise_on_all(UserError):
            check_output(folder)
            results = Results(folder)
            head = None
            if head_file is not None:
                head = head_of(head_file) if head_file.is_dir() else heads.load(head_file)
            opened = measure.open_all(sets, ranks, options.skip_missing)
            built = towers.create(model, weights=weights is None)
            if weights is not None:
                load_into(built, model, weights)
            tokenizer = towers.tokenizer_of(model)
        built = built.to(ranks.device).eval()
        built.set_precision(precision)
        about = {
            "model": model.name,
            "pretrained": model.pretrained,
            "weights": None if weights is None else str(weights),
            "head": None if head is None else str(head_file),
        }
        rows = measure.measure_all(built, tokenizer, sets, opened, ranks, results, how, about, head)
    except UserError as error:
        return cli.report_error(error, options)
    if ranks.is_main:
        print(as_markdown(rows), end="")
        print(f"\n{folder}/results.jsonl, results.csv, results.md")
    ranks.leave()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, "evaluate.batch_size=64", required=False)
    which = parser.add_argument_group("model")
    which.add_argument("--model", help="open_clip's name of one, instead of a config")
    which.add_argument("--pretrained", help="open_clip's tag, or a file, with --model")
    which.add_argument(
        "--weights",
        type=Path,
        help="a checkpoint: .safetensors, what open_clip loads, or <run>/checkpoints/step<number>; `pretrained` "
        "measures a config's model as it was before; default: with --config the run's model.safetensors",
    )
    which.add_argument("--head", type=Path, help="default: the one beside the weights; `none`: prompts")
    which.add_argument("--precision", choices=("fp16", "bf16", "fp32"), help="default: the config's, else fp32")
    data = parser.add_argument_group("data")
    data.add_argument("--suite", nargs="+", action="extend", metavar="NAME", help="suites of known data sets")
    data.add_argument("--datasets", nargs="+", action="extend", metavar="NAME", help="known data sets")
    data.add_argument("--root", help="where they lie: a folder with all of them, or e.g. /data/{dataset}")
    data.add_argument("--class-names", help="for all of them: a text file, or e.g. flowers")
    data.add_argument("--templates", help="for all of them: a text file, one template, or e.g. food101")
    data.add_argument("--skip-missing", action="store_true", help="leave out the sets that are not there")
    parser.add_argument("--batch-size", type=cli.count(1), help="images encoded at once on each rank")
    parser.add_argument("--workers", type=int, help="loader processes on each rank")
    parser.add_argument("--output", type=Path, help="folder; default: the run's, else runs/evaluate")
    parser.add_argument("--label", help="what tables call the model; default: the run's name, or the model's")
    parser.add_argument("--classifiers", type=Path, help="folder of prompts' embeddings; default: in the output")
    parser.add_argument("--again", action="store_true", help="measure what the results have already, too")
    return parser


def _run(options: argparse.Namespace, config: "Config") -> Path:
    return cli.run_folder(config.train.output, options.config)


def _folder(options: argparse.Namespace, config: "Config | None") -> Path:
    return Path("runs/evaluate") if config is None else _run(options, config)


def _weights(options: argparse.Namespace, config: "Config | None") -> Path | None:
    """The checkpoint that is measured; None: the model as it comes."""
    from dive_fast.errors import ConfigError
    from dive_fast.evaluate.early_checks import find_weights

    if options.weights == Path("pretrained"):
        return None
    if options.weights is None and config is None:
        return None
    run = _folder(options, config)
    try:
        return find_weights(options.weights, "--weights", run)
    except ConfigError as error:
        if options.weights is not None:
            raise
        raise ConfigError(f"{error}; --weights pretrained measures the model before training") from None


def _head(options: argparse.Namespace, weights: Path | None) -> Path | None:
    """The file of a head, or the folder of a checkpoint, which may have one; None: prompts classify."""
    from dive_fast.model.head import beside

    if options.head is not None:
        return None if options.head == Path("none") else Path(options.head)
    if weights is None or weights.is_dir():
        return weights
    return beside(weights)


def _head_of_folder(model: "ModelConfig") -> Path | None:
    """The head in the folder of a model that is a run, ``local-dir:<run>``."""
    from dive_fast.model.head import FILE

    if not model.name.startswith("local-dir:"):
        return None
    found = Path(model.name.removeprefix("local-dir:")).expanduser() / FILE
    return found if found.is_file() else None


def _label(options: argparse.Namespace, model: "ModelConfig", weights: Path | None) -> str:
    if weights is None:
        return model.name if model.pretrained is None else f"{model.name}/{model.pretrained}"
    folder = weights.parent
    run = folder.absolute().parent.name  # of a folder in a run's: its checkpoints, its best weights
    if weights.name == "model.safetensors":
        return f"{run}/best" if folder.name == "best" else folder.name
    return f"{run if folder.name == 'checkpoints' else folder.name}/{weights.name}"


if __name__ == "__main__":
    sys.exit(main())
