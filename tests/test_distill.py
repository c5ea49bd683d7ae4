"""``Distiller`` against plain loops in float64, and the teacher, which must stay as it is."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseops.train.distill import Distiller


class Net(nn.Module):
    """first -> ReLU -> last, with what a teacher could be changed by: dropout and a batch norm."""

    def __init__(self, answer=lambda y, hidden: y):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        # far from uniform, where the divergence is no difference of equal numbers
        nn.init.normal_(self.last.weight, std=2.0)
        self.dropout, self.answer = nn.Dropout(0.5), answer

    def forward(self, x, scale=1.0):
        hidden = self.norm(self.first(x)).relu()
        return self.answer(self.last(self.dropout(hidden)) * scale, hidden)


def pair(answer=lambda y, hidden: y):
    """Teacher and student, in evaluation mode so that each forward gives the same."""
    return Net(answer).eval(), Net(answer).eval()


def divergence(student, teacher, temperature):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of the rows of two lists of lists, averaged."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        q, p = ([math.exp(z / temperature) for z in row] for row in (ours, theirs))
        for a, b in zip(p, q, strict=True):
            total += a / sum(p) * math.log((a / sum(p)) / (b / sum(q)))
    return temperature**2 * total / len(student)


def relative_error(student, teacher):
    mine, its = student.flatten().tolist(), teacher.flatten().tolist()
    return sum((a - b) ** 2 for a, b in zip(mine, its, strict=True)) / sum(b * b for b in its)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_formula(temperature):
    teacher, student = pair()
    x = torch.randn(5, 4)
    output, loss = Distiller(teacher, temperature=temperature)(student, x)
    assert torch.equal(output, student(x))
    expected = divergence(output.tolist(), teacher(x).tolist(), temperature)
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-4)
    # the gradient by the logits: T (softmax(student / T) - softmax(teacher / T)) / N
    student_logits = output.detach().double().requires_grad_()
    cold = F.softmax(student_logits / temperature, 1) - F.softmax(teacher(x).double() / temperature, 1)
    (by_bias,) = torch.autograd.grad(loss, student.last.bias)
    torch.testing.assert_close(by_bias.double(), temperature * cold.sum(0) / 5, rtol=1e-3, atol=1e-6)


def test_a_student_that_equals_its_teacher_loses_nothing():
    teacher, _ = pair()
    _, loss = Distiller(teacher, features=["first"])(copy.deepcopy(teacher), torch.randn(5, 4))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("features", "weights"),
    [
        (["norm", "last"], (1, 1)),
        ([("norm", "norm"), "last"], (1, 1)),
        ({"norm": 3.0, ("last", "last"): 0.5}, (3, 0.5)),
    ],
)
def test_features(features, weights):
    teacher, student = pair()
    x = torch.randn(5, 4)

    def outputs(net):
        hidden = net.norm(net.first(x))
        return hidden, net.last(hidden.relu())

    expected = sum(
        weight * relative_error(mine, its)
        for weight, mine, its in zip(weights, outputs(student), outputs(teacher), strict=True)
    )
    _, loss = Distiller(teacher, temperature=None, features=features)(student, x)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    output, both = Distiller(teacher, features=features)(student, x)
    assert both.item() == pytest.approx(expected + divergence(output.tolist(), teacher(x).tolist(), 4.0))


def test_names_of_a_feature_may_differ():
    teacher, student = pair()
    wrapped = nn.Sequential(student)
    x = torch.randn(5, 4)
    _, expected = Distiller(teacher, features=["first"])(student, x)
    _, loss = Distiller(teacher, features=[("0.first", "first")])(wrapped, x)
    assert torch.equal(loss, expected)


def test_a_feature_of_zeros_has_a_finite_loss():
    teacher, student = pair()
    nn.init.zeros_(teacher.last.weight)
    nn.init.zeros_(teacher.last.bias)
    _, loss = Distiller(teacher, temperature=None, features=["last"])(
        copy.deepcopy(teacher), torch.ones(2, 4)
    )
    assert loss.item() == 0


def test_the_teacher_is_run_in_evaluation_mode_and_not_changed():
    teacher, student = pair()
    teacher.train()
    teacher.dropout.eval()
    before = copy.deepcopy(teacher.state_dict())
    x = torch.randn(5, 4)
    student.train()
    distiller = Distiller(teacher, features=["first"])
    torch.manual_seed(1)
    output, loss = distiller(student, x)
    loss.backward()
    assert [m.training for m in (teacher, teacher.norm, teacher.dropout)] == [True, True, False]
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    teacher.eval()
    expected = divergence(output.tolist(), teacher(x).tolist(), 4.0)
    assert distiller(copy.deepcopy(teacher), x)[1].item() == pytest.approx(0, abs=1e-6)
    assert loss.item() > expected * 0.999
    assert student.training and not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert not any(m._forward_hooks for m in teacher.modules())


def test_dropout_of_the_student_is_its_own():
    """The teacher draws no random numbers, so that the student trains as it would alone."""
    teacher, student = pair()
    teacher.train()
    student.train()
    x = torch.randn(5, 4)
    torch.manual_seed(3)
    alone = copy.deepcopy(student)(x)
    torch.manual_seed(3)
    assert torch.equal(Distiller(teacher)(student, x)[0], alone)


@pytest.mark.parametrize("form", [tuple, dict])
def test_several_inputs(form):
    teacher, student = pair()
    x = torch.randn(5, 4)
    given = (x, 2.0) if form is tuple else {"scale": 2.0, "x": x}
    output, loss = Distiller(teacher)(student, given)
    assert torch.equal(output, student(x, 2.0))
    assert loss.item() == pytest.approx(divergence(output.tolist(), teacher(x, 2.0).tolist(), 4.0), rel=1e-4)


@pytest.mark.parametrize(
    ("answer", "logits"),
    [
        (lambda y, hidden: SimpleNamespace(logits=y, hidden=hidden), None),
        (lambda y, hidden: {"logits": y, "hidden": hidden}, None),
        (lambda y, hidden: (hidden, y), lambda output: output[1]),
    ],
)
def test_logits_in_an_output(answer, logits):
    teacher, student = pair(answer)
    x = torch.randn(5, 4)
    _, loss = Distiller(teacher, logits=logits)(student, x)
    teacher.answer = student.answer = lambda y, hidden: y
    assert torch.equal(loss, Distiller(teacher)(student, x)[1])


@pytest.mark.parametrize("answer", [lambda a, b: (a, b), lambda a, b: {"boxes": a, "kinds": b}])
def test_losses_of_several_heads_are_summed(answer):
    teacher, student = pair(lambda y, hidden: answer(y, hidden))
    x = torch.randn(5, 4)
    output, loss = Distiller(teacher)(student, x)
    ours, theirs = (list(o.values()) if isinstance(o, dict) else o for o in (output, teacher(x)))
    expected = sum(divergence(a.tolist(), b.tolist(), 4.0) for a, b in zip(ours, theirs, strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "options", "dim"), [((2, 5, 3), {}, 2), ((2, 3, 4, 5), {}, 1), ((2, 3, 5), {"dim": 1}, 1)]
)
def test_where_the_classes_lie(shape, options, dim):
    teacher, student = nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1)
    shapes = lambda output: output.view(shape)  # noqa: E731
    x = torch.randn(1, 1, math.prod(shape))
    _, loss = Distiller(teacher, logits=shapes, **options)(student, x)
    ours, theirs = (
        net(x).view(shape).movedim(dim, -1).reshape(-1, shape[dim]).tolist() for net in (student, teacher)
    )
    assert loss.item() == pytest.approx(divergence(ours, theirs, 4.0), rel=1e-4)


def test_mix():
    distiller = Distiller(Net(), alpha=0.3)
    assert distiller.mix(torch.tensor(1.0), torch.tensor(10.0)).item() == pytest.approx(0.7 + 3.0)


def test_watching_code_that_calls_the_student():
    teacher, student = pair()
    distiller = Distiller(teacher, features=["first"])
    x, z = torch.randn(5, 4), torch.randn(3, 4)
    expected = [distiller(student, given)[1].item() for given in (x, z)]
    with distiller.watch(student) as loss:
        with pytest.raises(ValueError, match="Distiller: student must be called .* got no call"):
            loss()
        with torch.no_grad():
            student(z)
        with pytest.raises(ValueError, match="got no call"):
            loss()
        student(x)
        assert loss().item() == pytest.approx(expected[0])
        student(z)
        assert loss().item() == pytest.approx(sum(expected) / 2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_a_student_that_changes_its_input_in_place():
    teacher = nn.Linear(4, 3)
    student = nn.Sequential(nn.ReLU(inplace=True), copy.deepcopy(teacher))
    x = torch.randn(5, 4)
    _, loss = Distiller(teacher)(student, x.clone())
    expected = divergence(teacher(x.relu()).tolist(), teacher(x).tolist(), 4.0)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_autocast_counts_for_the_teacher_and_not_for_the_loss():
    teacher, student = pair()
    x = torch.randn(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, loss = Distiller(teacher)(student, x)
        expected = divergence(output.tolist(), teacher(x).tolist(), 4.0)
    assert output.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a_failing_forward_leaves_no_hook():
    teacher, student = pair()
    distiller = Distiller(teacher, features=["first"])
    with pytest.raises(RuntimeError):
        distiller(student, torch.randn(5, 3))
    modules = [*teacher.modules(), *student.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be greater than 0, got nan"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"features": ["first", "second"]}, "features must name modules of the teacher, got 'second'"),
        ({"temperature": None}, "features must be given with temperature=None, got none"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=f"^Distiller: {message}$"):
        Distiller(Net(), **options)


def test_errors_of_types():
    with pytest.raises(TypeError, match=r"^Distiller: teacher must be a torch.nn.Module, got function$"):
        Distiller(lambda x: x)
    with pytest.raises(TypeError, match=r"^Distiller: features must be a list of module names, got 'first'$"):
        Distiller(Net(), features="first")
    teacher, student = pair(lambda y, hidden: SimpleNamespace(answer=y))
    with pytest.raises(TypeError, match="^Distiller: logits must be a tensor, .* got SimpleNamespace"):
        Distiller(teacher)(student, torch.randn(5, 4))


def test_errors_of_students():
    teacher, student = pair()
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"student must be another model .* \(copy.deepcopy\(model\)"):
        Distiller(teacher)(teacher, x)
    with pytest.raises(ValueError, match="features must name modules of the student, got 'first'"):
        Distiller(teacher, features=["first"])(nn.Linear(4, 3), x)
    student.first, student.norm, student.last = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
    with pytest.raises(
        ValueError, match=r"'first' .* teacher's shape, \(5, 6\), got \(5, 5\) \(distil before"
    ):
        Distiller(teacher, features=["first"])(student, x)
    student.last = nn.Linear(5, 2)
    with pytest.raises(ValueError, match=r"logits of the student must .* \(5, 3\), got \(5, 2\)"):
        Distiller(teacher)(student, x)
    student.answer = lambda y, hidden: {"a": y}
    with pytest.raises(ValueError, match=r"the teacher's heads, \[''\], got \['a'\]"):
        Distiller(teacher)(student, x)


def test_a_feature_must_be_called():
    teacher, student = pair()
    student.dropout = nn.Identity()
    student.forward = lambda x: F.linear(x, student.first.weight)
    with pytest.raises(ValueError, match="'first' must be called as often .* got 0 calls for 1"):
        Distiller(teacher, temperature=None, features=["first"])(student, torch.randn(5, 4))
    teacher.spare, student.spare = nn.Linear(1, 1), nn.Linear(1, 1)
    with pytest.raises(ValueError, match="'spare' must be called .* at least once, got 0 calls for 0"):
        Distiller(teacher, temperature=None, features=["spare"])(student, torch.randn(5, 4))
