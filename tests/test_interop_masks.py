"""``take_masks``: masks of other tools are found, and the model computes what it did, as an ordinary one."""

import copy
import warnings

import pytest
import torch
from conftest import assert_untouched, state
from torch import nn
from torch.nn.utils import parametrize, prune

import sparseops
from sparseops.interop import take_masks
from sparseops.train.pruner import Pruner

SHAPES = {
    "linear": (lambda: nn.Linear(32, 16), (3, 32), "weight"),
    "conv": (lambda: nn.Conv2d(16, 16, 3, groups=2), (2, 16, 5, 5), "weight"),
    "transposed": (lambda: nn.ConvTranspose1d(8, 6, 3), (2, 8, 5), "weight"),
    "lstm": (lambda: nn.LSTM(32, 32, 2, bidirectional=True), (4, 2, 32), "weight_hh_l1_reverse"),
    "gru": (lambda: nn.GRU(8, 8), (4, 2, 8), "weight_ih_l0"),
    "embedding": (lambda: nn.Embedding(9, 8), None, "weight"),
    "attention": (lambda: Attention(), (3, 2, 8), "attention.in_proj_weight"),
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class FakeSparsity(nn.Module):
    """As that of torch.ao.pruning."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return self.mask * x

    def state_dict(self, *args, **kwargs):
        return {}


def by_prune(module, key, mask):
    prune.custom_from_mask(module, key, mask)


def by_prune_twice(module, key, mask):
    first = mask.clone()
    first.view(-1)[::2] = True
    prune.custom_from_mask(module, key, first)
    second = mask.clone()
    second.view(-1)[1::2] = True
    prune.custom_from_mask(module, key, second)


def by_fake_sparsity(module, key, mask):
    parametrize.register_parametrization(module, key, FakeSparsity(mask))


def by_two_fake_sparsities(module, key, mask):
    first, second = mask.clone(), mask.clone()
    first.view(-1)[::2] = second.view(-1)[1::2] = True
    by_fake_sparsity(module, key, first)
    by_fake_sparsity(module, key, second.float())


def by_asp(module, key, mask):
    with torch.no_grad():
        weight = getattr(module, key)
        module.register_buffer(f"__{key}_mma_pruned_p", weight * ~mask)
        module.register_buffer(f"__{key}_mma_mask", mask)
        weight.mul_(mask)


TOOLS = {
    "prune": (by_prune, "torch.nn.utils.prune"),
    "prune twice": (by_prune_twice, "torch.nn.utils.prune"),
    "FakeSparsity": (by_fake_sparsity, "FakeSparsity"),
    "two FakeSparsities": (by_two_fake_sparsities, "FakeSparsity"),
    "ASP": (by_asp, "ASP"),
}


def random_mask(weight):
    return torch.rand(weight.shape, device=weight.device) > 0.4


def masked_model(kind, tool):
    """The layer in a model, with hooks of its own, and the mask that was put in."""
    make, size, name = SHAPES[kind]
    model = nn.Sequential(make())
    x = torch.arange(6) if size is None else torch.randn(size)
    owner, _, key = f"0.{name}".rpartition(".")
    module = model.get_submodule(owner)
    module.register_forward_pre_hook(lambda module, args: None)
    mask = random_mask(getattr(module, key))
    TOOLS[tool][0](module, key, mask)
    return model, make, x, f"0.{name}", mask


def run(model, x):
    y = model(x)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind", SHAPES)
def test_every_tool_on_every_kind_of_layer(kind, tool, inplace):
    model, make, x, name, mask = masked_model(kind, tool)
    expected = run(model, x).detach()
    before = None if inplace else state(model)
    taken = take_masks(model, inplace=inplace)
    assert (taken.model is model) == inplace
    if not inplace:
        assert_untouched(model, before)
        assert torch.equal(run(model, x), expected), "the given model still runs"
    assert list(taken.masks) == [name]
    assert taken.masks[name].dtype == torch.bool
    assert torch.equal(taken.masks[name], mask)
    assert taken.sources == {name: TOOLS[tool][1]}
    assert taken.notes == []

    assert torch.equal(run(taken.model, x), expected)
    weight = taken.model.get_parameter(name)
    assert not weight[~mask].any() and weight[mask].all()
    ordinary = nn.Sequential(make())
    assert list(taken.model.state_dict()) == list(ordinary.state_dict())
    assert [n for n, _ in taken.model.named_parameters()] == [n for n, _ in ordinary.named_parameters()]
    assert not dict(taken.model.named_buffers())
    assert [type(m) for m in taken.model.modules()] == [type(m) for m in ordinary.modules()]
    owner = taken.model.get_submodule(name.rpartition(".")[0])
    assert len(owner._forward_pre_hooks) == 1, "a hook that is not the tool's stays"
    assert vars(owner).keys() == vars(ordinary.get_submodule(name.rpartition(".")[0])).keys()
    assert torch.equal(run(copy.deepcopy(taken.model), x), expected)
    ordinary.load_state_dict(taken.model.state_dict())
    assert torch.equal(run(ordinary, x), expected)


@pytest.mark.parametrize("kind", ["linear", "conv", "lstm"])
@pytest.mark.parametrize("tool", ["prune", "FakeSparsity", "ASP"])
def test_trained_on_with_the_masks(kind, tool):
    model, _, x, name, mask = masked_model(kind, tool)
    taken = take_masks(model)
    optimizer = torch.optim.SGD(taken.model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    pruner = Pruner(taken.model, taken.masks)
    before = taken.model.get_parameter(name).detach().clone()
    for _ in range(3):
        run(taken.model, x).square().sum().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    weight = taken.model.get_parameter(name)
    assert not weight[~mask].any()
    assert (weight != before)[mask].all()


def test_bias_masks_are_kept_by_the_pruner():
    layer = nn.Linear(32, 16)
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.l1_unstructured(layer, "bias", 0.5)
    taken = take_masks(nn.Sequential(layer))
    assert list(taken.masks) == ["0.weight", "0.bias"]
    assert int(taken.masks["0.bias"].sum()) == 8
    assert torch.equal(taken.masks["0.bias"], layer.bias_mask != 0)
    pruner = Pruner(taken.model, taken.masks)
    with torch.no_grad():
        taken.model[0].bias.add_(1)
    pruner.step()
    assert torch.equal(taken.model[0].bias != 0, taken.masks["0.bias"])


def test_packed_without_pruning():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            quads = layer.weight.view(-1, 4)
            mask = torch.zeros_like(quads).scatter_(1, quads.abs().topk(2).indices, 1).view_as(layer.weight)
            prune.custom_from_mask(layer, "weight", mask)
    taken = take_masks(model)
    sparse = sparseops.convert(taken.model, prune=None)
    assert [type(m).__name__ for m in sparse] == ["SparseLinear", "ReLU", "SparseLinear"]
    x = torch.randn(5, 64)
    torch.testing.assert_close(sparse(x), model(x))


def test_the_sparsifier_of_torch():
    pruning = pytest.importorskip("torch.ao.pruning")
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))
    sparsifier = pruning.WeightNormSparsifier(1.0, (1, 4), 2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    x = torch.randn(3, 32)
    expected = model(x).detach()
    taken = take_masks(model)
    assert torch.equal(taken.model(x), expected)
    assert (taken.masks["0.weight"].view(-1, 4).sum(1) == 2).all()
    sparsifier.squash_mask()
    assert torch.equal(model[0].weight, taken.model[0].weight)


def test_one_of_two_parametrized_tensors():
    model = nn.Sequential(nn.LSTM(8, 8))
    by_fake_sparsity(model[0], "weight_hh_l0", random_mask(model[0].weight_hh_l0))
    parametrize.register_parametrization(model[0], "weight_ih_l0", nn.Tanh())
    x = torch.randn(4, 2, 8)
    expected = run(model, x).detach()
    with pytest.warns(UserWarning, match="0.weight_ih_l0 is parametrized by Tanh and left as it is"):
        taken = take_masks(model)
    assert list(taken.masks) == ["0.weight_hh_l0"]
    assert torch.equal(run(taken.model, x), expected)
    assert torch.equal(run(model, x), expected)
    assert parametrize.is_parametrized(taken.model[0], "weight_ih_l0")
    assert not parametrize.is_parametrized(taken.model[0], "weight_hh_l0")


def test_other_parametrizations_are_left_and_said():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    nn.utils.parametrizations.weight_norm(model[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[1])
    nn.utils.parametrizations.orthogonal(model[2])
    by_fake_sparsity(model[2], "weight", random_mask(model[2].weight))
    prune.l1_unstructured(model[3], "weight", 0.5)
    x = torch.randn(3, 8)
    expected = model(x).detach()
    with pytest.warns(UserWarning) as caught:
        taken = take_masks(model)
    assert len(caught) == 1, "one warning for all"
    assert caught[0].filename == __file__
    assert list(taken.masks) == ["3.weight"]
    assert [note.split(" and left")[0] for note in taken.notes] == [
        "0.weight is parametrized by _WeightNorm",
        "the weight of 1 is computed",
        "2.weight is parametrized by _Orthogonal, FakeSparsity",
    ]
    assert all(note in str(taken) and note in str(caught[0].message) for note in taken.notes)
    torch.testing.assert_close(taken.model(x), expected)


def test_zeros_of_plain_weights():
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)), nn.LayerNorm(32), nn.Conv2d(4, 300, 1))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
        model[1].weight[0, :10] = 0  # 10 of 1024: just not a hundredth
        model[2].weight.zero_()
        model[3].bias.zero_()
        model[4].weight[3, :11] = 0
        model[6].weight[:16] = 0
        model[7].weight[7] = 0  # one channel of 300
    prune.l1_unstructured(model[5], "weight", 0.25)
    taken = take_masks(model, zeros=True)
    assert taken.sources == {
        "5.weight": "torch.nn.utils.prune",
        "0.weight": "zeros",
        "4.weight": "zeros",
        "7.weight": "zeros",
    }
    for name, mask in taken.masks.items():
        assert torch.equal(mask, taken.model.get_parameter(name) != 0)
    assert list(take_masks(model).masks) == ["5.weight"]


def test_zeros_of_computed_weights_are_not_taken():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        for layer in model:
            layer.weight[:, :4] = 0
    parametrize.register_parametrization(model[1], "weight", nn.Tanh())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[2])
    with pytest.warns(UserWarning, match="1.weight is parametrized by Tanh .*weight of 2 is computed"):
        assert list(take_masks(model, zeros=True).masks) == ["0.weight"]


def test_a_mask_counts_more_than_zeros():
    model = nn.Sequential(nn.Linear(8, 8))
    mask = random_mask(model[0].weight)
    mask[0, 0] = True
    with torch.no_grad():
        model[0].weight[0, 0] = 0
    by_asp(model[0], "weight", mask)
    taken = take_masks(model, zeros=True)
    assert torch.equal(taken.masks["0.weight"], mask)
    assert taken.sources == {"0.weight": "ASP"}


def test_an_untrained_channel_of_inputs():
    layer = nn.Linear(300, 4)
    with torch.no_grad():
        layer.weight[:, 5] = 0
    assert list(take_masks(layer, zeros=True).masks) == ["weight"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


@pytest.mark.parametrize("tool", ["prune", "FakeSparsity"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_tied_weight_masked_in_one_place(tool, inplace):
    model = Tied()
    mask = random_mask(model.head.weight)
    TOOLS[tool][0](model.head, "weight", mask)
    x = torch.arange(16)
    expected, embedding = model(x).detach(), model.embedding.weight.detach().clone()
    with pytest.warns(UserWarning, match="head.weight is no longer one weight"):
        taken = take_masks(model, inplace=inplace)
    assert list(taken.masks) == ["head.weight"]
    assert torch.equal(taken.model(x), expected)
    assert torch.equal(taken.model.embedding.weight, embedding)
    assert not taken.model.head.weight[~mask].any()


@pytest.mark.parametrize("tool", ["prune", "FakeSparsity"])
def test_a_tied_weight_masked_alike_stays_tied(tool):
    model = Tied()
    mask = random_mask(model.head.weight)
    TOOLS[tool][0](model.head, "weight", mask)
    TOOLS[tool][0](model.embedding, "weight", mask)
    x = torch.arange(16)
    expected = model(x).detach()
    taken = take_masks(model)
    assert taken.model.head.weight is taken.model.embedding.weight
    assert torch.equal(taken.model(x), expected)
    assert list(taken.masks) == ["embedding.weight"], "one weight, one mask"
    assert torch.equal(taken.masks["embedding.weight"], mask)
    Pruner(taken.model, taken.masks)


@pytest.mark.parametrize("tool", ["prune", "FakeSparsity"])
def test_a_tied_weight_with_two_masks(tool):
    model = Tied()
    TOOLS[tool][0](model.head, "weight", random_mask(model.head.weight))
    TOOLS[tool][0](model.embedding, "weight", random_mask(model.embedding.weight))
    x = torch.arange(16)
    expected = model(x).detach()
    with pytest.warns(UserWarning, match="no longer one weight"):
        taken = take_masks(model)
    assert torch.equal(taken.model(x), expected)


def test_asp_masks_the_weight_of_all_who_hold_it():
    model = Tied()
    first, second = random_mask(model.head.weight), random_mask(model.head.weight)
    by_asp(model.head, "weight", first)
    by_asp(model.embedding, "weight", second)
    taken = take_masks(model)
    assert taken.model.head.weight is taken.model.embedding.weight
    assert list(taken.masks) == ["embedding.weight"]
    assert torch.equal(taken.masks["embedding.weight"], first & second)
    assert taken.sources == {"embedding.weight": "ASP"}
    assert taken.notes == []
    Pruner(taken.model, taken.masks)


def test_asp_of_a_submodule_and_of_other_names():
    model = nn.Sequential(Attention(), nn.Linear(8, 8))
    attention = model[0].attention
    mask = random_mask(attention.out_proj.weight)
    attention.register_buffer("__weight_mma_mask", mask)
    other = random_mask(model[1].weight)
    model[1].register_buffer("weight_mma_mask", other.to(torch.uint8), persistent=False)
    taken = take_masks(model)
    assert set(taken.masks) == {"0.attention.out_proj.weight", "1.weight"}
    assert not taken.model[0].attention.out_proj.weight[~mask].any()
    assert torch.equal(taken.model[1].weight != 0, other)
    assert not dict(taken.model.named_buffers())
    assert not taken.model[1]._non_persistent_buffers_set


def test_asp_without_its_weight():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].register_buffer("__gain_mma_mask", torch.ones(8, 8, dtype=torch.bool))
    with pytest.raises(
        ValueError, match="0.__gain_mma_mask must belong to one parameter 'gain' .*, got none"
    ):
        take_masks(model)


def test_what_is_masked_is_zero_whatever_it_was():
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight[0] = torch.tensor([float("nan"), float("inf"), -1.0, 2.0])
    prune.custom_from_mask(layer, "weight", torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]]))
    weight = take_masks(layer).model.weight
    assert weight[0].tolist() == [0, 0, 0, 2]
    assert not torch.signbit(weight[0]).any()


@pytest.mark.parametrize("tool", ["prune", "FakeSparsity", "ASP"])
def test_in_place_the_parameter_is_the_same_object(tool):
    model, _, _, name, _ = masked_model("linear", tool)
    model[0].requires_grad_(False)
    (before,) = (p for p in model.parameters() if p.dim() == 2)
    taken = take_masks(model, inplace=True)
    assert taken.model.get_parameter(name) is before
    assert not before.requires_grad


def test_a_copy_of_a_frozen_tied_weight_stays_frozen():
    model = Tied().requires_grad_(False)
    prune.l1_unstructured(model.head, "weight", 0.5)
    with pytest.warns(UserWarning):
        assert not take_masks(model).model.head.weight.requires_grad


def test_recurrent_weights_lie_in_one_piece_again(monkeypatch):
    layer = nn.LSTM(8, 8)
    prune.l1_unstructured(layer, "weight_hh_l0", 0.5)
    flattened = []
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", lambda self: flattened.append(list(self._parameters)))
    take_masks(layer, inplace=True)
    assert flattened[-1:] == [[name for name, _ in nn.LSTM(8, 8).named_parameters()]]


def test_masks_are_tensors_of_their_own():
    model = nn.Sequential(nn.Linear(8, 8))
    mask = random_mask(model[0].weight)
    by_asp(model[0], "weight", mask)
    taken = take_masks(model, inplace=True)
    assert taken.masks["0.weight"].data_ptr() != mask.data_ptr()


def test_in_inference_mode():
    model = nn.Sequential(nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with torch.inference_mode():
        taken = take_masks(model)
    assert not taken.model[0].weight.is_inference()
    taken.model(torch.randn(2, 8)).sum().backward()


def test_text():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", 0.25)
    prune.l1_unstructured(model[0], "bias", 0.5)
    assert str(take_masks(model)).splitlines() == [
        "0.weight   75.0% kept  torch.nn.utils.prune",
        "0.bias     50.0% kept  torch.nn.utils.prune",
    ]


def test_nothing_found():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError) as caught:
        take_masks(model)
    for word in ("torch.nn.utils.prune", "FakeSparsity", "ASP", "weight_orig", "zeros=True", "got none"):
        assert word in str(caught.value)
    with pytest.raises(ValueError, match="got none") as caught:
        take_masks(model, zeros=True)
    assert "zeros=True" not in str(caught.value)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "mask, words",
    [
        (torch.full((8, 8), 0.5), "the mask of 1.weight must hold only 0 and 1, got 0.5"),
        (torch.full((8, 8), float("nan")), "the mask of 1.weight must hold only 0 and 1, got nan"),
        (torch.ones(8, 4), r"the mask of 1.weight must have shape \(8, 8\), got \(8, 4\)"),
        (torch.ones(8, 8, device="meta"), "1.weight must hold data, got a tensor on the meta device"),
    ],
)
def test_bad_masks(mask, words, inplace):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", 0.5)
    model[1].register_buffer("__weight_mma_mask", mask)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        take_masks(model, inplace=inplace)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name in before:
        if not before[name].is_meta:
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True)


def test_no_module():
    with pytest.raises(TypeError, match="take_masks: model must be a torch.nn.Module, got dict"):
        take_masks({})


class Uncopiable(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("no copies")


def test_a_model_that_cannot_be_copied():
    model = Uncopiable(8, 8)
    prune.l1_unstructured(model, "weight", 0.5)
    with pytest.raises(RuntimeError, match="take_masks: model must survive copy.deepcopy"):
        take_masks(model)
    assert take_masks(model, inplace=True).model is model
