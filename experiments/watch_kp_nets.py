#!/usr/bin/env python
"""Train InsPose for some steps and print what decides whether its KP-Nets live."""

import argparse
import logging
import re
import sys
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from torch import Tensor

from inspose_d2 import get_cfg
from inspose_d2.cli import told
from inspose_d2.engine.train_loop import DivergedError
from inspose_d2.engine.trainer import Trainer
from inspose_d2.modeling.candidates import Candidates
from inspose_d2.modeling.head import gather_patches
from inspose_d2.modeling.inspose import InsPose
from inspose_d2.modeling.predictions import PersonPredictions

COLUMNS = {  # name: format
    "step": "4d",
    "rate": "8.5f",
    "keypoint": "9.4g",  # its loss
    "norm": "9.4g",  # of all gradients
    "head": "9.4g",  # of the gradient of params_pred
    "active": "7.3f",  # share of the units of the last hidden layer
    "patch": "7.1f",  # mean norm of the patches that params_pred sees
    "cosine": "7.3f",  # mean between two of them
    "params": "8.3f",  # root mean square of the KP-Nets' parameters
    "features": "8.3f",  # the same of the shared features
    "limit": "8.3g",  # rate * curvature / (2 + 2 * momentum): unstable above 1
}
POWER_ITERATIONS = 8


class Watch(HookBase):
    """Prints a row after each step."""

    def __init__(self, model: InsPose, every: int) -> None:
        """Look over the shoulder of the model's KP-Nets.

        Args:
            model: that is trained, not distributed.
            every: steps between two rows.
        """
        self.model, self.every = model, every
        self.seen: dict[str, Any] = {}
        self.log_probs, self.at = model.kp_net.log_probs, model.head.at
        model.kp_net.log_probs = self._log_probs  # type: ignore[method-assign]
        model.head.at = self._at  # type: ignore[method-assign]

    def _at(self, features: list[Tensor], candidates: Candidates) -> PersonPredictions:
        patches = gather_patches(features, candidates.image, candidates.index)
        self.seen["patches"] = patches.detach()
        return self.at(features, candidates)

    def _log_probs(
        self, params: Tensor, candidates: Candidates, features: Tensor, cells: Tensor
    ) -> Tensor:
        self.seen |= {"candidates": candidates, "features": features.detach(), "cells": cells}
        # As they were when the gradient was taken.
        conv = self.model.head.params_pred
        self.seen["weight"] = conv.weight.detach().permute(0, 2, 3, 1).flatten(1).clone()
        self.seen["bias"] = conv.bias.detach().clone()  # type: ignore[union-attr]
        self.seen["rate"] = self.trainer.optimizer.param_groups[0]["lr"]
        return self.log_probs(params, candidates, features, cells)

    def after_step(self) -> None:
        """Print the row of this step."""
        trainer = self.trainer
        if trainer.iter % self.every or len(self.seen["patches"]) < 2:
            return
        scalars = {name: value for name, (value, _) in trainer.storage.latest().items()}
        momentum = trainer.optimizer.param_groups[0]["momentum"]
        patches, bias = self.seen["patches"], self.seen["bias"]
        unit = torch.nn.functional.normalize(patches)
        n = len(patches)
        params = patches @ self.seen["weight"].T + bias
        row = {
            "step": trainer.iter,
            "rate": self.seen["rate"],
            "keypoint": scalars["loss_keypoint"],
            "norm": scalars["gradient_norm"],
            "head": scalars["gradient_norm_params_pred"],
            "active": scalars["active_units"],
            "patch": patches.norm(dim=1).mean().item(),
            "cosine": ((unit.sum(dim=0).square().sum() - n) / (n * (n - 1))).item(),
            "params": params.square().mean().sqrt().item(),
            "features": self.seen["features"].square().mean().sqrt().item(),
            "limit": self.seen["rate"] * self.curvature() / (2 + 2 * momentum),
        }
        print(" ".join(f"{row[name]:{form}}" for name, form in COLUMNS.items()), flush=True)

    def curvature(self) -> float:
        """Largest eigenvalue of the Hessian of the keypoint loss in the weights of params_pred.

        SGD with momentum m is stable on a quadratic below (2 + 2 m) / rate.
        """
        weight = self.seen["weight"].requires_grad_()
        params = self.seen["patches"] @ weight.T + self.seen["bias"]
        loss = self._keypoint_loss(params)
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        vector = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        value = 0.0
        for _ in range(POWER_ITERATIONS):
            vector = vector / vector.norm()
            (product,) = torch.autograd.grad(gradient, weight, vector, retain_graph=True)
            value, vector = (vector * product).sum().item(), product
            if not product.norm() > 0:
                break
        return value

    def _keypoint_loss(self, params: Tensor) -> Tensor:
        """Mean over all keypoints, as if all were labelled; twice differentiable."""
        kp_net, candidates = self.model.kp_net, self.seen["candidates"]
        log_probs = []
        for image, own in enumerate(candidates.slices()):
            shared = kp_net.shared_input(self.seen["features"][image])
            args = params[own], candidates.points[own], candidates.strides[own], shared
            maps = kp_net.logits(*args).log_softmax(dim=2)
            log_probs.append(maps.gather(2, self.seen["cells"][own][..., None]).flatten())
        return -torch.cat(log_probs).mean()


def main(argv: list[str] | None = None) -> None:
    """Run the program.

    Args:
        argv: command line, without the program's name.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="quick/paper_heads")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=1, help="steps between two rows")
    parser.add_argument("--params-rate", type=float, default=1.0, help="factor for params_pred")
    parser.add_argument("--params-init", type=float, default=1.0, help="the same, at first")
    parser.add_argument("opts", nargs="*", help="KEY VALUE ... of the config")
    args = parser.parse_args(argv)
    cfg = get_cfg(args.config_file, [*args.opts, "DATASETS.TEST", ()])
    seed_all_rng(max(cfg.SEED, 0))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    model = trainer._trainer.model
    conv = model.head.params_pred
    with torch.no_grad():
        conv.weight.mul_(args.params_init)
    for parameter in conv.parameters():  # for SGD the same as another rate
        parameter.register_hook(lambda gradient: gradient * args.params_rate)
    trainer.max_iter = min(args.steps, trainer.max_iter)
    trainer.register_hooks([Watch(model, args.every)])
    print(" ".join(f"{name:>{re.match(r'[0-9]+', form)[0]}}" for name, form in COLUMNS.items()))
    try:
        trainer.train()
    except DivergedError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    logging.disable(logging.INFO)
    sys.exit(told("watch_kp_nets.py", main))
