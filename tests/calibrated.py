"""What tests of calibration share: weights of models as targets, and collecting what is known of one."""

from sparseops._eligible import Layer
from sparseops.train.calibration import collect
from sparseops.train.targets import Target

ALL = {"gradient", "inputs", "hessian", "movement", "scale"}


def target_of(module, name="", parameter="weight"):
    weight = getattr(module, parameter)
    kind = type(module).__name__
    return Target(Layer((name,), module, kind, tuple(weight.shape), weight.nbytes), parameter)


def targets_of(model):
    """Every matrix of the model's layers."""
    return [
        target_of(module, name, parameter)
        for name, module in model.named_modules()
        for parameter, p in module._parameters.items()
        if p is not None and p.dim() >= 2
    ]


def collect_one(module, needs, batches, loss=None, parameter="weight", **options):
    return collect(module, [target_of(module, "", parameter)], needs, batches, loss, **options)[parameter]


def squared(output, y=None):
    return (output - (0 if y is None else y)).square().mean()
