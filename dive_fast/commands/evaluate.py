"""Evaluates a model on image sets: that of a run by ``dive-fast evaluate --config vitb16_dive.json``.

``dive-fast evaluate --model ViT-B-16-quickgelu --pretrained openai --suite imagenet_ood --root /data``
evaluates one of open_clip's models, and ``dive-fast evaluate --compare ViT-B/16`` prints published results.
``--attack apgd-ce --eps 4`` measures the accuracy under attack instead.
On several GPUs: ``deepspeed launch/evaluate.py ...``. See docs/evaluation.md.
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from dive_fast.commands import cli

if TYPE_CHECKING:
    from dive_fast.config.schema import Config, EvaluationSet, ModelConfig
    from dive_fast.evaluation.attacks.attack_options import AttackOptions
    from dive_fast.evaluation.results import Results
    from dive_fast.evaluation.tables import Row

RESULTS = Path("runs/evaluate")
"""Default output folder with --model."""
VARIANT = ("label", "weights_digest", "precision")
"""Fields of a row that the sets of one figure share."""


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; a user's mistake becomes one line and exit code 2."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    if options.compare and options.config is None and options.model is None:
        if options.suite or options.datasets or options.weights or options.overrides:
            parser.error("to measure a model before --compare, name it by --config or --model")
        return _compare(options, options.output or RESULTS)
    missing = "name a run by --config, a model by --model, or published results by --compare MODEL"
    cli.check_model_options(parser, options, missing)
    names = [*(options.suite or []), *(options.datasets or [])]
    if names and options.root is None:
        parser.error("--suite and --datasets need --root, e.g. --root /data/{dataset}")
    if not names and (options.class_names or options.templates):
        parser.error("--class-names and --templates go with --suite or --datasets")
    if not names and (options.config is None or options.root is not None):
        parser.error("name data sets by --suite or --datasets")
    _check_attack(parser, options)
    _check_update(parser, options)

    # Only pydantic is imported so far, so that a typo is reported at once.
    from dive_fast.config.schema import EvaluationSet
    from dive_fast.errors import ConfigError, UserError
    from dive_fast.evaluation.attacks.attack_options import MAX_BATCH, attackable
    from dive_fast.evaluation.datasets.catalog import expand_suites
    from dive_fast.evaluation.early_checks import check_output, check_sets
    from dive_fast.model.model_names import check_name

    def named_sets() -> dict[str, EvaluationSet]:
        complete = {
            name: EvaluationSet(
                path=options.root,
                dataset=name,
                class_names=options.class_names,
                templates=options.templates,
            )
            for name in expand_suites(names)
        }
        return _halved(complete) if options.base_new else complete

    def check(model: "ModelConfig", config: "Config | None") -> None:
        weights = _weights(options, config)
        _prompts(options, config)
        check_output(options.output or _folder(options, config))
        check_name(model, weights=weights is None)
        if names:
            check_sets(named_sets(), "", options.skip_missing)
        elif config is not None:
            check_sets(config.evaluate.sets, skips_missing=options.skip_missing)

    try:
        attack = _attack(options)
        config, model, defaults = cli.config_or_model(options, check)
        weights, prompt_path = _weights(options, config), _prompts(options, config)
        update = _update(options)
        if update is not None and prompt_path is None:
            raise ConfigError("--upgrade: name the prompts of the old model by --prompts, a prompts.safetensors")
        from dive_fast.distributed import join, use_cpu_without_gpu

        use_cpu_without_gpu()
        from dive_fast.checkpoint.load_weights import head_of, load_into
        from dive_fast.evaluation import compatibility, evaluator, published
        from dive_fast.evaluation.attacks.attacked_sets import attack_all
        from dive_fast.evaluation.results import Results
        from dive_fast.evaluation.tables import as_markdown
        from dive_fast.model import head as heads
        from dive_fast.model import prompt_file, towers

        if update is not None:
            with _about_update():
                towers.check(update)
        sets = named_sets() or (_halved(defaults.sets) if options.base_new else defaults.sets)
        compared = None if options.compare is None else published.find_model(options.compare or model.name)
        towers.check(model, weights=weights is None)
        if not sets:
            raise ConfigError("evaluate.sets is empty; add sets there, or name some by --suite and --root")

        ranks = join()
    except UserError as error:
        return cli.report_error(error, options)
    head_file = _head(options, weights)
    if weights is None and options.head is None and (unused := _head_of_folder(model)) is not None:
        ranks.print(f"{model.name} has a trained head, which is not used; --head {unused} evaluates it")
    default_precision = "fp32" if config is None or attack is not None else config.train.precision
    precision = options.precision or default_precision
    default_batch = defaults.batch_size if attack is None else min(defaults.batch_size, MAX_BATCH)
    folder = options.output or _folder(options, config)
    evaluation = evaluator.Options(
        options.label or _label(options, model, weights, prompt_path),
        precision,
        options.batch_size or default_batch,
        defaults.workers if options.workers is None else options.workers,
        defaults.loader,
        options.classifiers or folder / "classifiers",
        options.force,
    )
    try:
        with ranks.raise_on_all(UserError):
            check_output(folder)
            results = Results(folder)
            head = None
            if head_file is not None:
                head = head_of(head_file) if head_file.is_dir() else heads.load(head_file)
            prompts = None if prompt_path is None or update is not None else prompt_file.load(prompt_path)
        # Outside of the blocks: all ranks take part in opening each set.
        opened = evaluator.open_all(sets, ranks, options.skip_missing, "" if names else "evaluate.sets")
        if attack is not None:
            attackable(opened, attack.name)
        if update is not None and prompt_path is not None:
            with results.writing_tables() if ranks.is_main else nullcontext():
                _, measured = compatibility.measure_update(
                    *(model, update, prompt_path, _retrained(options), sets, opened, ranks, results, evaluation)
                )
            if ranks.is_main:
                print(f"{compatibility.message(measured)}\n\n{compatibility.as_markdown(measured)}")
                print(f"{folder}/{', '.join(['results.jsonl', *compatibility.write(measured, folder)])}")
            ranks.leave()
            return 0
        with ranks.raise_on_all(UserError):
            evaluated = towers.create(model, weights=weights is None)
            if weights is not None:
                load_into(evaluated, model, weights)
            tokenizer = towers.tokenizer_of(model)
            if prompts is not None and prompt_path is not None:
                prompt_file.attach(prompts, prompt_path, evaluated, tokenizer)
                learned = prompts.origin.class_names
                for line in compatibility.remarks_on_new_classes(sets, opened, learned, prompt_path):
                    ranks.print(f"warning: {line}")
        evaluated = evaluated.to(ranks.device).eval()
        evaluated.set_precision(precision)
        model_fields = {
            "model": model.name,
            "pretrained": model.pretrained,
            "weights": None if weights is None else str(weights),
            "head": None if head is None else str(head_file),
        }
        model_fields |= {} if prompt_path is None else {"prompts": str(prompt_path)}
        with results.writing_tables() if ranks.is_main else nullcontext():
            if attack is None:
                rows = evaluator.measure_all(
                    evaluated, tokenizer, sets, opened, ranks, results, evaluation, model_fields, head
                )
            else:
                rows = attack_all(
                    *(evaluated, tokenizer, sets, opened, ranks, results, evaluation, attack, model_fields, head)
                )
    except UserError as error:
        return cli.report_error(error, options)
    if ranks.is_main:
        print(as_markdown(rows), end="")
        for line in _harmonic_means(rows, sets):
            print(line)
        if compared is not None:
            print(f"\n{published.comparison(compared, results.rows)}", end="")
        written = ", ".join(["results.jsonl, results.csv, results.md", *_figures(rows, results, attack)])
        print(f"\n{folder}/{written}")
    ranks.leave()
    return 0


def _figures(rows: "list[Row]", results: "Results", attack: "AttackOptions | None") -> list[str]:
    """Draws the figure of this evaluation from all stored rows; returns its name, if there is anything to draw."""
    from dive_fast.evaluation import plots
    from dive_fast.evaluation.attacks import attack_figure
    from dive_fast.evaluation.tables import lines_of

    if attack is not None:
        figure = f"attack_{attack.name}_{attack.norm}.png"
        is_drawn = attack_figure.draw(results.rows, results.folder / figure, attack.name, attack.norm)
        return [figure] if is_drawn else []
    variant = [rows[0].get(name) for name in VARIANT]
    same = [row for row in results.rows if [row.get(name) for name in VARIANT] == variant]
    (line,) = lines_of(same).values()
    label, precision = rows[0]["label"], rows[0]["precision"]
    figure = f"reliability_{re.sub(r'[^A-Za-z0-9._-]+', '_', label)}.png"
    is_drawn = plots.reliability(list(line.values()), results.folder / figure, f"{label}, {precision}")
    return [figure] if is_drawn else []


def _halved(sets: "Mapping[str, EvaluationSet]") -> "dict[str, EvaluationSet]":
    """The base and the new classes of each set, as sets of their own."""
    return {
        f"{name}-{part}": config.model_copy(update={"classes": part})
        for name, config in sets.items()
        for part in ("base", "new")
    }


def _harmonic_means(rows: "list[Row]", sets: "Mapping[str, EvaluationSet]") -> list[str]:
    """A line for each set whose base and new classes were measured."""
    from dive_fast.evaluation.compatibility import halves, harmonic

    values = {str(row["set"]): float(row["value"]) for row in rows}
    return [
        f"{name}: base {100 * values[base]:.1f}, new {100 * values[new]:.1f}, harmonic mean "
        f"{100 * harmonic(values[base], values[new]):.1f}"
        for name, (base, new) in halves(sets).items()
        if base in values and new in values
    ]


def _check_update(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Checks that the options of an updated model are used together."""
    if options.upgrade is None:
        for option in ("upgrade_pretrained", "retrained"):
            if getattr(options, option) is not None:
                parser.error(f"--{option.replace('_', '-')} goes with --upgrade, e.g. --upgrade EVA02-B-16")
        return
    if options.prompts == Path("none"):
        parser.error("--upgrade measures learned prompts; --prompts names their file")
    for option in ("weights", "head", "attack", "compare", "label"):
        if getattr(options, option) is not None:
            parser.error(f"--{option} does not go with --upgrade, which measures both models by prompts alone")


def _update(options: argparse.Namespace) -> "ModelConfig | None":
    """The new model of ``--upgrade``.

    Raises:
        ConfigError: there is no such model.
    """
    from dive_fast.config.schema import ModelConfig
    from dive_fast.model.model_names import check_name

    if options.upgrade is None:
        return None
    model = ModelConfig(name=options.upgrade, pretrained=options.upgrade_pretrained)
    with _about_update():
        check_name(model)
    return model


@contextmanager
def _about_update() -> Iterator[None]:
    """Errors name the options of the updated model instead of the config's keys."""
    from dive_fast.errors import ConfigError

    try:
        yield
    except ConfigError as error:
        text = str(error).replace("model.pretrained", "--upgrade-pretrained").replace("model.name", "--upgrade")
        raise ConfigError(text) from None


def _retrained(options: argparse.Namespace) -> Path | None:
    from dive_fast.evaluation.early_checks import find_prompts

    return None if options.retrained is None else find_prompts(options.retrained, "--retrained")


def _check_attack(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Checks that the options of attacks are used together."""
    if options.attack is None:
        for option in ("eps", "norm", "attack_steps", "attack_samples", "attack_seed"):
            if getattr(options, option) is not None:
                parser.error(f"--{option.replace('_', '-')} goes with --attack, e.g. --attack apgd-ce")
    elif options.eps is None:
        parser.error("--attack needs --eps in 255ths, e.g. --eps 4, or several: --eps 1 2 4")
    elif options.compare is not None:
        parser.error("--compare: there are no published results under attack; leave it out")


def _attack(options: argparse.Namespace) -> "AttackOptions | None":
    """The attack of ``--attack``.

    Raises:
        ConfigError: an option has an impossible value, or the attack's package is not installed.
    """
    from dive_fast.evaluation.attacks.attack_options import AttackOptions, check_installed

    if options.attack is None:
        return None
    attack = AttackOptions(
        options.attack,
        tuple(dict.fromkeys(options.eps)),
        options.norm or "linf",
        options.attack_steps,
        options.attack_samples,
        options.attack_seed or 0,
    )
    check_installed(attack.name)
    return attack


def _compare(options: argparse.Namespace, folder: Path) -> int:
    """Prints published results next to those of a results folder, without measuring."""
    from dive_fast.errors import UserError
    from dive_fast.evaluation import published
    from dive_fast.evaluation.results import FILE, Results

    try:
        model = published.find_model(options.compare)
        rows = Results(folder).rows
    except UserError as error:
        return cli.report_error(error, options)
    print(published.comparison(model, rows), end="")
    if not rows:
        print(f"\n{folder / FILE} has no measured rows; --output names the folder of other results")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, "evaluate.batch_size=64", required=False)
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="open_clip's name of a model, instead of a config")
    model.add_argument("--pretrained", help="open_clip's tag, or a file, with --model")
    model.add_argument(
        "--weights",
        type=Path,
        help="a checkpoint: .safetensors, a file that open_clip loads, or <run>/checkpoints/step<number>; "
        "`pretrained`: a config's model before training; default: with --config the run's model.safetensors",
    )
    model.add_argument(
        "--head", type=Path, help="head file; default: the one next to the weights; `none`: prompts"
    )
    model.add_argument(
        "--prompts",
        type=Path,
        help="learned prompts that classify, prompts.safetensors of a run; also with another --model "
        "(docs/prompts.md); default: with --config those of the run; `none`: hand-made prompts",
    )
    model.add_argument(
        "--precision",
        choices=("fp16", "bf16", "fp32"),
        help="precision of the towers; default: the config's; with --model fp32",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--suite", nargs="+", action="extend", metavar="NAME", help="suites of known data sets")
    data.add_argument("--datasets", nargs="+", action="extend", metavar="NAME", help="known data sets")
    data.add_argument("--root", help="folder with all data sets, or a pattern, e.g. /data/{dataset}")
    data.add_argument("--class-names", help="class names for all data sets: a text file, or e.g. flowers")
    data.add_argument(
        "--templates", help="templates for all data sets: a text file, one template, or e.g. food101"
    )
    data.add_argument("--skip-missing", action="store_true", help="leave out data sets that cannot be opened")
    data.add_argument(
        "--base-new",
        action="store_true",
        help="measure the first half of each set's classes and the others apart, and their harmonic mean",
    )
    update = parser.add_argument_group("prompts after an update of the model (docs/prompts.md)")
    update.add_argument("--upgrade", metavar="MODEL", help="the new model that the prompts are plugged into")
    update.add_argument("--upgrade-pretrained", metavar="TAG", help="its open_clip tag, or a file")
    update.add_argument(
        "--retrained", type=Path, metavar="FILE", help="prompts of the same method that were learned with it"
    )
    attack = parser.add_argument_group("accuracy under attack (docs/evaluation.md)")
    attack.add_argument("--attack", choices=("apgd-ce", "pgd", "autoattack"), help="measure under this attack")
    attack.add_argument(
        "--eps", nargs="+", type=float, metavar="N", help="largest change of an image, in 255ths; one row each"
    )
    attack.add_argument("--norm", choices=("linf", "l2"), help="norm of the change; default: linf")
    attack.add_argument(
        "--attack-steps", type=cli.count(1), help="gradients for each image; default: apgd-ce 100, pgd 10"
    )
    attack.add_argument(
        "--attack-samples", type=cli.count(1), help="size of a random subset of each set; default: all samples"
    )
    attack.add_argument("--attack-seed", type=cli.count(0), help="seed of subset and attack; default: 0")
    parser.add_argument(
        "--batch-size", type=cli.count(1), help="images encoded at once on each rank; attacked ones: at most 64"
    )
    parser.add_argument("--workers", type=int, help="loader processes on each rank")
    parser.add_argument(
        "--output", type=Path, help="output folder; default: the run folder; with --model runs/evaluate"
    )
    parser.add_argument("--label", help="name of the model in tables; default: name of the run or model")
    parser.add_argument(
        "--classifiers", type=Path, help="cache folder of prompt embeddings; default: in the output folder"
    )
    parser.add_argument(
        "--compare",
        nargs="?",
        const="",
        metavar="MODEL",
        help="print published results of a model, e.g. ViT-B/16, next to the measured ones; default: the "
        "evaluated model; without --config and --model nothing is measured",
    )
    parser.add_argument("--force", action="store_true", help="measure sets again even if the results have them")
    return parser


def _run(options: argparse.Namespace, config: "Config") -> Path:
    return cli.run_folder(config.train.output, options.config)


def _folder(options: argparse.Namespace, config: "Config | None") -> Path:
    return RESULTS if config is None else _run(options, config)


def _weights(options: argparse.Namespace, config: "Config | None") -> Path | None:
    """The checkpoint to evaluate; None: the pre-trained model."""
    from dive_fast.errors import ConfigError
    from dive_fast.evaluation.early_checks import find_weights

    if options.weights == Path("pretrained"):
        return None
    if options.weights is None and (config is None or _prompts(options, config) is not None):
        return None
    run = _folder(options, config)
    try:
        return find_weights(options.weights, "--weights", run)
    except ConfigError as error:
        if options.weights is not None:
            raise
        raise ConfigError(f"{error}; --weights pretrained measures the model before training") from None


def _prompts(options: argparse.Namespace, config: "Config | None") -> Path | None:
    """The file of learned prompts that classify; None: hand-made ones, or a head.

    Raises:
        ConfigError: the file does not exist.
    """
    from dive_fast.evaluation.early_checks import PROMPTS, find_prompts

    if options.prompts is None:
        path = None if config is None or options.weights is not None else _run(options, config) / PROMPTS
        return path if path is not None and path.is_file() else None
    if options.prompts == Path("none"):
        return None
    return find_prompts(options.prompts, "--prompts")


def _head(options: argparse.Namespace, weights: Path | None) -> Path | None:
    """A head file, or a checkpoint folder that may contain a head; None: prompts classify."""
    from dive_fast.model.head import find_head

    if options.head is not None:
        return None if options.head == Path("none") else Path(options.head)
    if weights is None or weights.is_dir():
        return weights
    return find_head(weights)


def _head_of_folder(model: "ModelConfig") -> Path | None:
    """The head in the folder of a ``local-dir:<run>`` model, if there is one."""
    from dive_fast.model.head import FILE

    if not model.name.startswith("local-dir:"):
        return None
    path = Path(model.name.removeprefix("local-dir:")).expanduser() / FILE
    return path if path.is_file() else None


def _label(
    options: argparse.Namespace, model: "ModelConfig", weights: Path | None, prompts: Path | None = None
) -> str:
    """The default label: the model's name, or the run's name with the checkpoint."""
    if prompts is not None:
        run = prompts.absolute().parent.name
        return run if options.prompts is None else f"{_label(options, model, weights)} with {run}"
    if weights is None:
        return model.name if model.pretrained is None else f"{model.name}/{model.pretrained}"
    folder = weights.parent
    run = folder.absolute().parent.name  # if the folder is <run>/checkpoints or <run>/best
    if weights.name == "model.safetensors":
        return f"{run}/best" if folder.name == "best" else folder.name
    return f"{run if folder.name == 'checkpoints' else folder.name}/{weights.name}"
