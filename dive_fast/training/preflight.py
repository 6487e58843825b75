"""Cheap checks of the machine before expensive work: each failure is one line that says what to do.

Otherwise a run fails only after its model is loaded, or after hours of embedding: on a folder that cannot be
written, a full disk, a missing compiler or package, or too little shared memory or too few open files for loaders.
"""

import logging
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dive_fast.checkpoint.lineage import REPLACED, RUN_FILES
from dive_fast.checkpoint.manifest import FOLDER as CHECKPOINTS
from dive_fast.config.schema import Config, DataConfig, EvaluateConfig, TrainConfig
from dive_fast.data import worker_memory
from dive_fast.distributed import Ranks
from dive_fast.engine.deepspeed_config import offloads_optimizer
from dive_fast.errors import ConfigError, UserError, machine_error
from dive_fast.methods import registry
from dive_fast.model.towers import Towers
from dive_fast.projections import rules as projections
from dive_fast.teacher import cache_files
from dive_fast.training.trackers import check_trackers

logger = logging.getLogger(__name__)

BASE_FILES, FILES_PER_WORKER = 100, 3
"""Open files of a run without loader processes, and the least number that each process adds."""


def check_environment(config: Config, folder: Path | None, ranks: Ranks) -> None:
    """Checks everything that is known before a model is loaded; all ranks call it.

    Args:
        folder: the run folder; None where nothing is written there.

    Raises:
        UserError: names the folder, package, tool or limit, and says what to do.
    """
    with ranks.raise_on_all(UserError):
        if ranks.is_main:
            if folder is not None:
                check_folder(folder, "train.output")
            if _writes_cache(config) and config.teacher.path is not None:
                check_folder(Path(config.teacher.path).parent, "teacher.path")
                check_cache_folder(Path(config.teacher.path))
            check_trackers(config.track)
        check_temporary_folder()
        check_compiler(config.train, config.deepspeed, ranks.device.type == "cuda")
        check_open_files(config.data, config.evaluate)


def check_sizes(
    config: Config, folder: Path, towers: Towers, pairs: int, ranks: Ranks, captions: int | None = None
) -> None:
    """Checks memory and disk, once the sizes of images and weights are known; all ranks call it.

    Args:
        pairs: pairs in the reference set; 0 where there is none.
        captions: captions of all pairs; default: one each.

    Raises:
        UserError: there is too little of them.
    """
    with ranks.raise_on_all(UserError):
        check_loader_memory(config, towers.preprocess.size, ranks)
        if ranks.is_main:
            check_disk(config, folder, towers, pairs, captions)


def check_folder(folder: Path, key: str) -> None:
    """Creates a folder and writes a file into it.

    Raises:
        UserError: either fails.
    """
    with _reporting_in_one_line(f"{key} = {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable"):
            pass


def check_inputs(config: Config, folder: Path) -> None:
    """Checks that a run reads neither its model nor its teacher cache from the files that it writes itself.

    Raises:
        ConfigError: names the key.
    """
    output = folder.resolve()
    model, pretrained = config.model.name, config.model.pretrained
    inputs = {
        "model.name": next(
            (model.removeprefix(scheme) for scheme in ("local-dir:", "hf:") if model.startswith(scheme)), None
        ),
        "model.pretrained": pretrained if pretrained is not None and Path(pretrained).is_file() else None,
        "teacher.path": config.teacher.path if _writes_cache(config) else None,
    }
    for key, value in inputs.items():
        if value is None:
            continue
        path = Path(value).resolve()
        if path == output or any(
            path.is_relative_to(output / name) for name in (*RUN_FILES, CHECKPOINTS, REPLACED)
        ):
            raise ConfigError(
                f"{key} = {value} is where the run itself writes (train.output = {folder}): set train.output to "
                "another folder"
            )


def check_cache_folder(path: Path) -> None:
    """Checks that a folder contains a teacher cache or nothing.

    Raises:
        ConfigError: it contains something else.
    """
    if path.is_dir() and not cache_files.is_there(path) and any(path.iterdir()):
        raise ConfigError(f"teacher.path = {path} is not empty, and not a teacher cache: name another folder")


def check_temporary_folder() -> None:
    """Checks that temporary files can be written.

    Raises:
        UserError: there is no usable folder for them.
    """
    variable = os.environ.get("TMPDIR")
    with _reporting_in_one_line("temporary files"):
        tempfile.gettempdir()
    if variable and not Path(variable).is_dir():
        logger.warning("TMPDIR = %s is not a folder: %s is used", variable, tempfile.gettempdir())


def check_compiler(train: TrainConfig, deepspeed: dict[str, Any], on_gpu: bool) -> None:
    """Checks for the compiler and the folders of compiled code that the options of a run need.

    Raises:
        ConfigError: names the option that needs it.
    """
    if offloads_optimizer(deepspeed) and not _is_installed("cpu_adam"):
        _require_compiler("deepspeed.zero_optimization.offload_optimizer", "CXX", ("c++", "g++", "clang++"))
        default = _home("TORCH_EXTENSIONS_DIR") / ".cache/torch_extensions"
        _require_writable("TORCH_EXTENSIONS_DIR", default)
    if train.compile:
        _require_compiler("train.compile", "CXX", ("g++", "c++", "clang++"))
    if on_gpu:
        # Triton compiles the launcher of each kernel with a C compiler.
        _require_compiler("the loss kernels (Triton)", "CC", ("gcc", "clang", "cc"))
        _require_writable("TRITON_CACHE_DIR", _home("TRITON_CACHE_DIR") / ".triton/cache")


def check_open_files(data: DataConfig, evaluate: EvaluateConfig) -> None:
    """Raises the limit of open files as far as the system allows, and checks that it suffices for the loaders.

    Raises:
        ConfigError: the limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    workers = data.target.workers + (data.reference.workers if data.reference else 0)
    workers += evaluate.workers if evaluate.sets or evaluate.geometry else 0
    needed = BASE_FILES + FILES_PER_WORKER * workers
    # Each tensor of a prefetched batch is an open file until it is used.
    wanted = needed + 8 * (worker_memory.MAX_AHEAD + 1) * workers
    if hard == resource.RLIM_INFINITY or soft < min(wanted, hard):
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft < needed:
        raise ConfigError(
            f"the limit of open files is {soft}, {workers} loader workers need at least {needed}: raise it "
            "(ulimit -n 65536), or use fewer data.target.workers and data.reference.workers"
        )


def check_loader_memory(config: Config, size: tuple[int, int], ranks: Ranks) -> None:
    """Checks that the batches of loader processes fit into memory and ``/dev/shm``; warns if few fit.

    Args:
        size: height and width of an image.

    Raises:
        ConfigError: not even one batch ahead of each process fits.
    """
    evaluate = config.evaluate
    halves = [half for half in (config.data.target, config.data.reference) if half is not None]
    loaders = [(half.loader, half.workers, half.batch_size // ranks.world_size) for half in halves]
    if evaluate.sets or evaluate.geometry:
        loaders.append((evaluate.loader, evaluate.workers, evaluate.batch_size))
    batches = [
        (worker_memory.batch_bytes(loader, images, size), worker_memory.processes(loader, workers))
        for loader, workers, images in loaders
        if workers
    ]
    least = [worker_memory.loader_bytes(batch, processes, 1) for batch, processes in batches]
    local_ranks = worker_memory.local_ranks()
    for name, needed, free, remedy in (
        (
            f"shared memory ({worker_memory.SHARED_MEMORY})",
            local_ranks * sum(each.shared for each in least),
            worker_memory.free_shared_memory(),
            "give the container more (docker run --shm-size=16g, or --ipc=host), or use fewer",
        ),
        (
            "the memory of this machine or container",
            local_ranks * sum(each.pixels for each in least),
            worker_memory.available_memory(),
            "use fewer",
        ),
    ):
        if needed > free:
            raise ConfigError(
                f"{name} is too small: loaders keep at least {_size(needed)} of batches there, {_size(free)} are "
                f"free: {remedy} data.target.workers, data.reference.workers and evaluate.workers"
            )
    ahead = min((worker_memory.batches_ahead(*each) for each in batches), default=worker_memory.MAX_AHEAD)
    if ahead < worker_memory.MAX_AHEAD and ranks.is_main:
        logger.warning(
            "loader processes prepare %d batch ahead instead of %d: %s of memory and %s of %s are free",
            *(ahead, worker_memory.MAX_AHEAD, _size(worker_memory.available_memory())),
            *(_size(worker_memory.free_shared_memory()), worker_memory.SHARED_MEMORY),
        )


def check_disk(config: Config, folder: Path, towers: Towers, pairs: int, captions: int | None = None) -> None:
    """Compares an estimate of what a run writes with the free disk space; warns if its checkpoints may not fit.

    Raises:
        ConfigError: not even the teacher cache, one checkpoint and the exported model fit.
    """
    if any(folder.glob("checkpoints/step*")):
        return  # a resumed run has written most of it
    options, path = config.train, config.teacher.path
    weights = sum(parameter.numel() * 4 for parameter in towers.parameters())
    teacher = registry.needs(config.objective).target_teacher == "moving"
    averaged = options.ema is not None
    rule = projections.create(config.projection)
    previous = rule is not None and rule.layout.keeps_previous
    # With AdamW's moments. With adapters or prompts, whose number of elements is small, almost nothing.
    has_prompts = registry.needs(config.objective).prompts
    is_small = config.model.lora is not None or has_prompts
    checkpoint = (3 + teacher + averaged + previous) * (0 if is_small else weights)
    exported = (1 + teacher + (averaged and not options.export_ema)) * (0 if has_prompts else weights)
    # By disk: folders on one disk share its free space.
    minimum = {_existing(folder).stat().st_dev: (folder, checkpoint + exported)}
    if _writes_cache(config) and not (folder / "teacher" if path is None else Path(path)).exists():
        assert config.data.reference is not None
        views = config.data.reference.views
        rows = pairs * (views if isinstance(views, int) else 1) + (pairs if captions is None else captions)
        parent = folder if path is None else Path(path).parent
        disk = _existing(parent).stat().st_dev
        size = minimum.get(disk, (parent, 0))[1]
        minimum[disk] = parent, size + rows * towers.width * (2 if config.teacher.dtype == "float16" else 4)
    for parent, size in minimum.values():
        free = shutil.disk_usage(_existing(parent)).free
        if size > free:
            raise ConfigError(
                f"{parent}: {_size(free)} are free on this disk, the run needs at least {_size(size)} (teacher "
                "cache and one checkpoint): free some space, or choose another disk with train.output and "
                "teacher.path"
            )
    # The next checkpoint is written before the oldest is removed.
    maximum = (options.keep_last + 1 + options.keep_best) * checkpoint + 2 * exported
    free = shutil.disk_usage(_existing(folder)).free
    if maximum > free:
        logger.warning(
            "%s: %s are free on this disk, the checkpoints of this run take up to %s (train.keep_last)",
            *(folder, _size(free), _size(maximum)),
        )


def _writes_cache(config: Config) -> bool:
    return registry.needs(config.objective).reference_teacher and config.teacher.mode == "cache"


def _is_installed(operator: str) -> bool:
    """Whether DeepSpeed was installed with this operator compiled."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get(operator))


def _require_compiler(option: str, variable: str, names: tuple[str, ...]) -> None:
    value = os.environ.get(variable)
    if not any(map(shutil.which, (value.split()[0],) if value and value.split() else names)):
        wanted = f"{variable} = {value}" if value else " or ".join(names)
        raise ConfigError(
            f"{option} needs a compiler, and {wanted} is not found: install one (apt install build-essential)"
        )


def _home(variable: str) -> Path:
    try:
        return Path.home()
    except RuntimeError:
        if variable in os.environ:
            return Path(tempfile.gettempdir())
        raise ConfigError(f"there is no home folder for compiled code: set HOME, or {variable}") from None


def _require_writable(variable: str, default: Path) -> None:
    path = Path(os.environ.get(variable) or default)
    try:
        check_folder(path, variable)
    except UserError as error:
        raise ConfigError(f"{error}; set {variable} to a folder for compiled code") from error


def _existing(path: Path) -> Path:
    """The path or its nearest parent that exists."""
    return next((each for each in (path, *path.absolute().parents) if each.exists()), Path("/"))


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


@contextmanager
def _reporting_in_one_line(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{place}: cannot write there: {machine_error(error) or error}") from error
