"""Detectron2's default trainer with what InsPose needs: its mapper, its evaluator, CPU workers.

Whatever ends a run leaves a checkpoint, from which it resumes exactly.
"""

import importlib
import logging
import os
import weakref
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.common import DatasetFromList
from detectron2.engine import DefaultTrainer, TrainerBase, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.modeling import build_model
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import (
    _generate_optimizer_class_with_gradient_clipping,
    maybe_add_gradient_clipping,
)
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoint import BestCheckpointer, CheckpointError, InsPoseCheckpointer
from ..config.check import doubt_about_sizes
from ..data.check import check_config
from ..data.coco_file import check_annotations, in_memory
from ..data.dataset_mapper import InsPoseDatasetMapper
from ..data.keypoint_sets import register_datasets
from ..data.train_loader import TrainingBatches, build_train_loader, mix
from ..evaluation import InsPoseEvaluator
from ..evaluation.results import inference_folder
from ..workers import guard_loader, on_one_worker
from .ema import EMA
from .pictures import EvalPictures
from .signals import Interrupted, StopRequest, children_may_end
from .test_time_augmentation import InsPoseWithTTA
from .train_loop import DivergedError, TrainLoop, explain

MAX_WARMUP = 5  # one in so many steps, at most, warms up

logger = logging.getLogger(__name__)


class EvalHook(hooks.EvalHook):
    """Detectron2's, which would also evaluate after a failure in the last step."""

    def after_train(self) -> None:
        """Evaluate after the last step."""
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


def _share_buffers(model: nn.Module) -> None:
    """Let all workers evaluate the model that is saved: each has its own batch statistics."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` that trains InsPose and evaluates its keypoints.

    A run that is resumed equals one that was never interrupted: on the CPU bit by bit.

    Attributes:
        seed: of the order of the images and of all random numbers of training.
        last_step: number of the last step that was done wholly, -1 before the first.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Build everything that training needs.

        ``DefaultTrainer.__init__`` gives DistributedDataParallel a device number, which it refuses
        for a model on the CPU; otherwise this does the same.

        Args:
            cfg: the whole config.

        Raises:
            ConfigError: see :func:`register_datasets` and :func:`check_config`.
            WorkersEnd: of several workers the first one cannot build the model, or refuses the
                annotations.
        """
        register_datasets(cfg)
        check_config(cfg)
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()  # nobody did
        cfg = self.fit_schedule(self.auto_scale_workers(cfg, comm.get_world_size()))
        doubt = doubt_about_sizes(cfg)
        if doubt:
            logger.warning(doubt)
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.last_step = -1
        self.stop = StopRequest()
        self.check_test_sets(cfg)  # or it would be found out at the first evaluation
        # The first one may have to download weights.
        model = on_one_worker(lambda: self.build_model(cfg)) or self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)

        on_cpu = model.device.type == "cpu"
        device_ids = {"device_ids": None} if on_cpu else {}
        model = create_ddp_model(model, broadcast_buffers=False, **device_ids)
        amp = cfg.SOLVER.AMP
        precision = getattr(torch, amp.PRECISION) if amp.ENABLED else None
        self._trainer = TrainLoop(
            model, data_loader, optimizer, stop=self.stop, precision=precision
        )

        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = InsPoseCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._order_data()
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Load as Detectron2 does; a resumed run goes on with the images that come next."""
        super().resume_or_load(resume)
        self.last_step = self.start_iter - 1
        self._order_data()

    def _order_data(self) -> None:
        """Let the data begin where training does; a subclass may have a loader of its own."""
        batches = getattr(self._trainer.data_loader, "batch_sampler", None)
        if isinstance(batches, TrainingBatches):
            batches.seed, batches.start = self.seed, self.start_iter
        elif self.start_iter:
            logger.warning("The training loader cannot be resumed: it begins with its first image")

    def train(self) -> Any:
        """Train; whatever ends it early, the last whole step is saved.

        Raises:
            DivergedError: a loss or gradient is not finite, or the KP-Nets are dead. The state
                before that step is saved as ``model_*_diverged.pth``; ``--resume`` starts from the
                checkpoint before.
            Interrupted: after SIGTERM or SIGINT, once all workers have done their step.
        """
        self._say_schedule()
        with self.stop:
            try:
                return super().train()
            except DivergedError as error:
                name = f"model_{self.iter:07d}_diverged"  # before this step
                self.checkpointer.save(name, tag_last=False)
                path = os.path.join(self.cfg.OUTPUT_DIR, f"{name}.pth")
                raise type(error)(f"{error}. {error.cure.format(path=path)}") from error
            except CheckpointError:
                raise
            except BaseException as error:
                self._save_last_step(error)
                if isinstance(error, Exception) and explain(error) is not error:
                    raise explain(error) from error
                raise

    def _say_schedule(self) -> None:
        solver, loader = self.cfg.SOLVER, self._trainer.data_loader
        batch, epochs = solver.IMS_PER_BATCH, ""
        if isinstance(getattr(loader, "batch_sampler", None), TrainingBatches):
            epochs = f", {self.max_iter * batch / len(loader.dataset):.3g} epochs"
        drops = solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
        falls = f", falls at {solver.STEPS}" if solver.STEPS and drops else ""
        logger.info(
            f"Steps: {self.start_iter} to {self.max_iter}, {batch} images each{epochs}; evaluation "
            + (f"every {x} steps" if (x := self.cfg.TEST.EVAL_PERIOD) else "at the end")
        )
        logger.info(
            f"Rate: {solver.BASE_LR:g} by {solver.LR_SCHEDULER_NAME}, warm-up over "
            f"{solver.WARMUP_ITERS} steps{falls}; {solver.OPTIMIZER}"
        )

    def _save_last_step(self, error: BaseException) -> None:
        """Save what an exception interrupts, so that nothing computed is lost."""
        if self._trainer.is_updating:
            logger.error("The weights were being updated: resume from the last checkpoint")
        elif self.start_iter <= self.last_step < self.max_iter - 1:  # the last one is saved already
            self.checkpointer.save(f"model_{self.last_step:07d}")
            logger.info(
                "Stopped by %s after step %d, which is saved: go on with --resume",
                type(error).__name__,
                self.last_step,
            )
        if isinstance(error, Interrupted):
            comm.synchronize()  # no worker may end before it is saved, or a launcher ends them all

    def run_step(self) -> None:
        """Train on one batch, with random numbers that depend on the seed and the step alone."""
        seed_all_rng(mix(self.seed, self.iter, comm.get_rank()))
        with children_may_end():
            super().run_step()
            self.last_step = self.iter

    def state_dict(self) -> dict[str, Any]:
        """Add the seed; the iteration is that of the last whole step."""
        state: dict[str, Any] = super().state_dict()
        return state | {"iteration": self.last_step, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, or what plain Detectron2 saved."""
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)

    def build_hooks(self) -> list[hooks.HookBase]:
        """Add ``model_best.pth`` and pictures to Detectron2's hooks; evaluation may be interrupted.

        The best is that of the highest keypoint AP on the first data set. With
        ``SOLVER.EMA_DECAY`` the average of the weights is evaluated and saved.
        """
        model, decay = self.model, self.cfg.SOLVER.EMA_DECAY
        ema = EMA(self.checkpointer.model, decay, self.checkpointer) if decay else None
        if ema is not None:
            model = ema.averaged

        names, period = self.cfg.DATASETS.TEST, self.cfg.TEST.EVAL_PERIOD
        pictures = EvalPictures(self.cfg) if names and comm.is_main_process() else None

        def test() -> Any:
            with self.stop.interruptible():
                _share_buffers(model)
                self._last_eval_results = self.test(self.cfg, model)
                if pictures is not None:
                    pictures.put(self.checkpointer.model if ema is None else ema.averaged)
            return self._last_eval_results

        built = [
            EvalHook(period, test) if isinstance(hook, hooks.EvalHook) else hook
            for hook in super().build_hooks()
        ]
        if ema is not None:
            built.insert(0, ema)
        if names and period > 0 and comm.is_main_process():
            metric = "keypoints/AP" if len(names) == 1 else f"{names[0]}/keypoints/AP"
            built.insert(-1, BestCheckpointer(period, self.checkpointer, metric))  # then the writer
        return built

    def build_writers(self) -> list[EventWriter]:
        """Build Detectron2's writers, and import what they write with before loaders start.

        The error that tells of a killed loader process may come at any line: inside an import it
        would be taken for another one.
        """
        importlib.import_module("torch.utils.tensorboard")
        return super().build_writers()

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Keep the images per worker when there are more or fewer than the config is made for.

        ``DefaultTrainer`` multiplies batch and rate by num_workers / REFERENCE_WORLD_SIZE and
        divides steps, warm-up and periods by it.

        Args:
            cfg: reads ``SOLVER`` and ``TEST.EVAL_PERIOD``.
            num_workers: that train now.

        Returns:
            The config for them.

        Raises:
            ValueError: the batch has no whole number of images per worker.
        """
        batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
        if reference and batch % reference:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {batch} must be a multiple of SOLVER.REFERENCE_WORLD_SIZE "
                f"{reference}, the workers it is meant for; SOLVER.REFERENCE_WORLD_SIZE 0 takes "
                "all of SOLVER as it stands, for any number of workers"
            )
        return DefaultTrainer.auto_scale_workers(cfg, num_workers)

    @staticmethod
    def fit_schedule(cfg: CfgNode) -> CfgNode:
        """Fit warm-up and steps into a short run, each with a warning.

        A warm-up that takes most of a run, as one for thousands of steps does, leaves the learning
        rate near 0, and nothing is learned.

        Args:
            cfg: reads ``SOLVER``, as scaled to the workers.

        Returns:
            The config with a warm-up of at most a fifth of ``SOLVER.MAX_ITER`` and without the
            ``SOLVER.STEPS`` that are never reached.
        """
        solver = cfg.SOLVER
        last, longest = solver.MAX_ITER, solver.MAX_ITER // MAX_WARMUP
        drops = solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
        reached = tuple(x for x in solver.STEPS if x < last or not drops)
        workers = comm.get_world_size()
        scaled = f" (as scaled to {workers} worker(s))" if solver.REFERENCE_WORLD_SIZE else ""
        if longest < solver.WARMUP_ITERS:
            logger.warning(
                f"SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} is more than a fifth of "
                f"SOLVER.MAX_ITER {last}{scaled}: the rate rises over {longest} steps instead"
            )
        if reached != tuple(solver.STEPS):
            logger.warning(
                f"SOLVER.STEPS {tuple(solver.STEPS)} are not all below SOLVER.MAX_ITER "
                f"{last}{scaled}: those beyond are never reached, and the rate does not fall "
                f"there. For a run of this length set SOLVER.STEPS ({last * 2 // 3}, "
                f"{last * 8 // 9})"
            )
        fitted = cfg.clone()
        fitted.defrost()
        fitted.SOLVER.WARMUP_ITERS = min(solver.WARMUP_ITERS, longest)
        fitted.SOLVER.STEPS = reached
        if cfg.is_frozen():
            fitted.freeze()
        return fitted

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model; Detectron2's trainer would print it."""
        return build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build SGD as Detectron2 does, or AdamW with ``SOLVER.OPTIMIZER: "ADAMW"``.

        Besides Detectron2's types of clipping, each parameter by itself, there is "full_model", the
        norm of all gradients together.
        """
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if clip.ENABLED and clip.CLIP_TYPE == "full_model":
            plain = cfg.clone()
            plain.defrost()
            plain.SOLVER.CLIP_GRADIENTS.ENABLED = False
            optimizer = cls.build_optimizer(plain, model)
            clipper = partial(
                nn.utils.clip_grad_norm_, max_norm=clip.CLIP_VALUE, norm_type=clip.NORM_TYPE
            )
            # As Detectron2 adds its own types.
            optimizer.__class__ = _generate_optimizer_class_with_gradient_clipping(
                type(optimizer), global_clipper=clipper
            )
            return optimizer
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        adamw = torch.optim.AdamW(
            params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY
        )
        return maybe_add_gradient_clipping(cfg, adamw)

    @classmethod
    def build_mapper(cls, cfg: CfgNode, is_train: bool) -> DatasetMapper:
        """Build what reads an image and its persons."""
        return InsPoseDatasetMapper(cfg, is_train)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Check the annotations, load training data through :meth:`build_mapper`.

        Raises:
            ValueError: the config asks for what this loader cannot do.
        """
        if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
            raise ValueError(
                "DATALOADER.SAMPLER_TRAIN must be 'TrainingSampler', the one whose order can be "
                f"resumed, got {cfg.DATALOADER.SAMPLER_TRAIN!r}"
            )
        checked = {name: cls.check_dataset(cfg, name) for name in cfg.DATASETS.TRAIN}
        num_workers = comm.get_world_size()
        if cfg.SOLVER.IMS_PER_BATCH % num_workers:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} must be a multiple of the number "
                f"of workers, {num_workers}"
            )
        with in_memory(
            {MetadataCatalog.get(name).json_file: x for name, x in checked.items() if x}
        ):
            dataset = get_detection_dataset_dicts(
                cfg.DATASETS.TRAIN,
                filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
                min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
                if cfg.MODEL.KEYPOINT_ON
                else 0,
            )
        logger.info(
            "Training data: %s: %d images, %d annotations",
            *(", ".join(cfg.DATASETS.TRAIN), len(dataset)),
            sum(len(image.get("annotations", ())) for image in dataset),
        )
        return build_train_loader(
            DatasetFromList(dataset, copy=False),
            cls.build_mapper(cfg, is_train=True),
            batch_size=cfg.SOLVER.IMS_PER_BATCH // num_workers,
            seed=max(cfg.SEED, 0),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            group=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Check the annotations that poses will be scored by, load the images."""
        checked = cls.check_dataset(cfg, dataset_name, evaluation=True)
        mapper = cls.build_mapper(cfg, is_train=False)
        file = MetadataCatalog.get(dataset_name).get("json_file")
        with in_memory({file: checked} if checked else {}, evaluation=True):
            return guard_loader(build_detection_test_loader(cfg, dataset_name, mapper=mapper))

    @classmethod
    def check_test_sets(cls, cfg: CfgNode) -> None:
        """Refuse bad annotations of ``DATASETS.TEST``, see :meth:`check_dataset`."""
        for name in cfg.DATASETS.TEST:
            coco = cls.check_dataset(cfg, name, evaluation=True)
            if coco:
                counts = (len(coco.get(key, ())) for key in ("images", "annotations"))
                logger.info("Evaluation data: %s: %d images, %d annotations", name, *counts)

    @staticmethod
    def check_dataset(
        cfg: CfgNode, name: str, *, evaluation: bool = False
    ) -> dict[str, Any] | None:
        """Refuse bad annotations before Detectron2 trips over them, or trains on them.

        One worker of each machine reads and checks them.

        Args:
            cfg: reads ``MODEL.INSPOSE.NUM_KEYPOINTS``.
            name: of a registered data set; one without a ``json_file`` is not in COCO's format.
            evaluation: see :func:`check_annotations`.

        Returns:
            The annotations as the json has them, for :func:`in_memory`; None where this worker has
            not read them.

        Raises:
            AnnotationError: says what is wrong, where, and what to do.
            WorkersEnd: the same, of several workers.
        """
        metadata = MetadataCatalog.get(name)
        if not metadata.get("json_file"):
            return None
        return on_one_worker(
            partial(
                check_annotations,
                metadata.json_file,
                cfg.MODEL.INSPOSE.NUM_KEYPOINTS,
                evaluation=evaluation,
                class_names=metadata.get("thing_classes"),
                image_root=metadata.get("image_root"),
            )
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> InsPoseEvaluator:
        """Evaluate keypoints, and boxes where there is a box head.

        Without it the boxes of the poses are only what encloses their keypoints.
        """
        with_boxes = cfg.MODEL.INSPOSE.BOX_HEAD.ENABLED
        return InsPoseEvaluator(
            dataset_name,
            tasks=("bbox", "keypoints") if with_boxes else ("keypoints",),
            output_dir=str(inference_folder(cfg, dataset_name)),
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )

    @classmethod
    def test_with_augmentation(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with the views of ``TEST.AUG``, each resized from the original image."""
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.MIN_SIZE_TEST = 0  # Detectron2's word for: do not resize
        return cls.test(cfg, InsPoseWithTTA(cfg, model))
