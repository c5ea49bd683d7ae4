"""What is done to a model while it is trained: pruning, retraining, evaluating, and doing it again.

``targets`` finds the weights that a plan prunes, ``calibration`` what criteria have to know of them,
``masks`` which of their elements go, ``zeros`` keeps these zero, and ``pruner`` is all of it in step with
training. ``fit`` is the loop around it, ``auto`` the plan that nobody has to write.
"""

from sparseops.train.auto import AutoPlan, auto_plan
from sparseops.train.distill import Distiller
from sparseops.train.fit import fit_sparse
from sparseops.train.loggers import Callback, CSVLogger, TensorBoardLogger, WandbLogger
from sparseops.train.permute import explain_permutation, permute_channels
from sparseops.train.permute_report import PermuteReport
from sparseops.train.pruner import Pruner
from sparseops.train.recalibrate import recalibrate
from sparseops.train.report import PruneReport
from sparseops.train.result import FitResult
from sparseops.train.sensitivity import Sensitivity, sensitivity

__all__ = [
    "AutoPlan",
    "CSVLogger",
    "Callback",
    "Distiller",
    "FitResult",
    "PermuteReport",
    "PruneReport",
    "Pruner",
    "Sensitivity",
    "TensorBoardLogger",
    "WandbLogger",
    "auto_plan",
    "explain_permutation",
    "fit_sparse",
    "permute_channels",
    "recalibrate",
    "sensitivity",
]
