"""Training and evaluation as a program: on one worker, on several, or under torchrun."""

import argparse
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from ..checkpoint import CheckpointError, InsPoseCheckpointer, NoValidCheckpoint
from ..config import ConfigError, get_cfg, list_configs
from ..data.check import check_config
from ..data.keypoint_sets import register_datasets
from .setup import describe_model, setup_run
from .signals import STOPPING
from .trainer import Trainer

logger = logging.getLogger(__name__)

# Variables by which launchers other than torchrun say how many processes they have started.
LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
BAD_INPUT = (OSError, ValueError, CheckpointError)  # before a run begins; on its way, failures


def program_of(args: argparse.Namespace) -> str:
    """Name of the program, for its messages."""
    return f"inspose {args.command}" if "command" in args else "train_net.py"


def load_config(args: argparse.Namespace) -> CfgNode:
    """Make the config from the command line.

    A config that cannot be used ends the program: one message, exit status 2.
    """
    try:
        if not args.config_file:
            raise ConfigError(
                "--config-file is missing: give a YAML file or one of these names: "
                + ", ".join(list_configs())
            )
        cfg = get_cfg(args.config_file, args.opts)
        register_datasets(cfg, training=not args.eval_only)
        check_config(cfg, training=not args.eval_only)
    except ConfigError as error:
        sys.stderr.write(f"{program_of(args)}: {error}\n")
        raise SystemExit(2) from error
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """Make the config from the command line and set up logging and the output folder."""
    cfg = load_config(args)
    cfg.freeze()
    setup_run(cfg)
    logger.info("Config: %s %s", args.config_file, " ".join(map(str, args.opts)))
    if (
        not args.eval_only
    ):  # as Detectron2 has it: trying out algorithms takes long at each new size
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    num_workers = comm.get_world_size()
    if num_workers > 1 and comm.is_main_process() and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        logger.warning(
            "%d workers share the CPUs: that is meant for small configs such as those of "
            "configs/quick; the others need GPUs",
            num_workers,
        )
    return cfg


def main(args: argparse.Namespace, trainer: type[Trainer] = Trainer) -> dict[str, Any] | None:
    """Run one worker.

    Exit status 2 where a run cannot begin with what it was given, 3 where ``--resume`` finds no
    valid checkpoint.
    """
    try:
        work = prepare(setup(args), args, trainer)
    except NoValidCheckpoint as error:
        logger.error("%s", error)
        sys.exit(3)
    except BAD_INPUT as error:
        logger.error("%s", error)
        sys.exit(2)
    return work()


def prepare(
    cfg: CfgNode, args: argparse.Namespace, trainer: type[Trainer]
) -> Callable[[], dict[str, Any] | None]:
    """Build all that a run needs; returns the evaluation with ``--eval-only``, else the training.

    ``TEST.AUG`` is for ``--eval-only``: evaluation on the way of training sees each image once.
    """
    if args.eval_only:
        trainer.check_test_sets(cfg)
        model = trainer.build_model(cfg)
        describe_model(cfg, model)
        InsPoseCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume, strict=True
        )
        test = trainer.test_with_augmentation if cfg.TEST.AUG.ENABLED else trainer.test
        return partial(test, cfg, model)
    training = trainer(cfg)
    describe_model(training.cfg, training.checkpointer.model)
    training.resume_or_load(resume=args.resume)
    return training.train


@contextlib.contextmanager
def under_torchrun(backend: str, timeout: timedelta) -> Iterator[None]:
    """Be one of the workers that torchrun has started, each with a GPU of its own where there are.

    Args:
        backend: of ``torch.distributed``.
        timeout: for which workers wait for each other.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timeout)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()
    yield
    dist.destroy_process_group()  # in order alone: where one has failed, others may still wait


def main_under_torchrun(args: argparse.Namespace, trainer: type[Trainer]) -> None:
    """Run one worker that torchrun has started: the world is described by the environment."""
    with under_torchrun("nccl" if torch.cuda.is_available() else "gloo", DEFAULT_TIMEOUT):
        main(args, trainer)


def problems_of_launch(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the workers that the command line asks for."""
    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < args.num_gpus:
        yield f"--num-gpus is {args.num_gpus}, but this machine has {num_gpus} GPUs"
    for variable in LAUNCHERS if args.num_machines == 1 else ():
        number = os.environ.get(variable, "")
        if number.isdecimal() and int(number) > 1:
            yield (
                f"{variable} is {number} in the environment: each of so many processes would train "
                "alone, into one OUTPUT_DIR. Start them with torchrun, or a single one with "
                f"--num-gpus; or unset {variable}"
            )
    if args.num_gpus < 0 or args.num_machines < 1:
        yield f"--num-gpus is {args.num_gpus}, --num-machines {args.num_machines}: give 1 or more"
    if not 0 <= args.machine_rank < max(args.num_machines, 1):
        yield f"--machine-rank is {args.machine_rank}: give one of 0 to --num-machines minus 1"
    if args.num_machines > 1 and args.dist_url == "auto":
        yield "--dist-url is missing: several machines meet at tcp://HOST:PORT of the first one"
    url = urlsplit(args.dist_url)
    try:
        is_place = url.scheme != "tcp" or url.port
    except ValueError:  # no number, or none of a port
        is_place = None
    if not is_place:
        yield f"--dist-url is {args.dist_url}: give tcp://HOST:PORT, the port in 1 to 65535"


def launch_workers(args: argparse.Namespace, trainer: type[Trainer] = Trainer) -> None:
    """Run a worker per GPU; what ends them ends this program with the same exit status."""
    received: list[int] = []

    def forward(signum: int, frame: object) -> None:  # noqa: ARG001
        received.append(signum)
        for worker in multiprocessing.active_children():
            if worker.pid:
                os.kill(worker.pid, signum)

    for problem in problems_of_launch(args):
        sys.stderr.write(f"{program_of(args)}: {problem}\n")
        sys.exit(2)
    if args.num_gpus > 1:
        load_config(args)  # once, or each worker would complain
        for signum in STOPPING:
            signal.signal(signum, forward)
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args, trainer),
        )
    except torch.multiprocessing.ProcessExitedException as error:
        sys.exit(error.exit_code if error.exit_code >= 0 else 128 - error.exit_code)
    if received:  # PyTorch makes the end of a worker by Ctrl-C one in order
        sys.exit(128 + received[0])


def run(args: argparse.Namespace | None = None, trainer: type[Trainer] = Trainer) -> None:
    """Train or evaluate.

    Args:
        args: of Detectron2's ``default_argument_parser``; None reads the command line by it.
        trainer: class of what trains and evaluates.
    """
    args = args or default_argument_parser().parse_args()
    try:
        if dist.is_torchelastic_launched():
            main_under_torchrun(args, trainer)
        else:
            launch_workers(args, trainer)
    except BAD_INPUT:  # what was wrong at the beginning has ended the program already
        traceback.print_exc()
        sys.exit(1)
