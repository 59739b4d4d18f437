"""Training: one loop for pretraining, fine-tuning and healing."""

from lathe.train.distil import Distillation
from lathe.train.evaluate import Evaluation, evaluate
from lathe.train.loop import StepReport, TrainResult, train
from lathe.train.loss import label_logits, objective_loss
from lathe.train.ranks import Ranks, joined
from lathe.train.run import fit
from lathe.train.settings import OptimizerSettings, SaveSettings, ScheduleSettings, TrainSettings

__all__ = [
    "Distillation",
    "Evaluation",
    "OptimizerSettings",
    "Ranks",
    "SaveSettings",
    "ScheduleSettings",
    "StepReport",
    "TrainResult",
    "TrainSettings",
    "evaluate",
    "fit",
    "joined",
    "label_logits",
    "objective_loss",
    "train",
]
