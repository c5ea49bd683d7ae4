"""Layers that stay dense: each reason, its code, and the sentence that a person reads."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import sparseops
from sparseops.nn import SparseLinear
from sparseops.report import Code


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OnlyNamed(nn.Linear):
    """Adds nothing to a forward."""

    def __init__(self, size):
        super().__init__(size, size)

    def reset_parameters(self):
        nn.init.normal_(self.weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.head = nn.Linear(64, 64)
        self.head.weight = self.embed.weight


class Views(nn.Module):
    """Two layers whose weights are parts of one tensor: apart, and overlapping."""

    def __init__(self, offset):
        super().__init__()
        flat = torch.randn(3 * 64 * 64)
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.a.weight.data = flat[: 64 * 64].view(64, 64)
        self.b.weight.data = flat[offset : offset + 64 * 64].view(64, 64)


def with_(layer, change):
    change(layer)
    return layer


def linear():
    return nn.Linear(64, 64)


def patched():
    layer = linear()
    layer.forward = lambda x: F.linear(x, layer.weight)
    return layer


def compiled_in_place():
    layer = linear()
    layer.compile(backend="eager")
    return layer


def subclass_weight():
    class Tagged(torch.Tensor):
        pass

    layer = linear()
    layer.weight = nn.Parameter(torch.randn(64, 64).as_subclass(Tagged))
    return layer


CASES = [
    (
        "too_small_in",
        lambda: nn.Linear(31, 64),
        Code.TOO_SMALL,
        "in_features must be at least 32 .* got 31 and 64",
    ),
    ("too_small_out", lambda: nn.Linear(64, 7), Code.TOO_SMALL, "out_features 8, got 64 and 7"),
    (
        "first_conv",
        lambda: nn.Conv2d(3, 64, 3),
        Code.TOO_SMALL,
        "input channels must be at least 16 .* 3 and 64",
    ),
    ("conv_out", lambda: nn.Conv1d(64, 7, 3), Code.TOO_SMALL, "output channels 8, got 64 and 7"),
    ("depthwise", lambda: nn.Conv2d(32, 64, 3, groups=32), Code.DEPTHWISE, "one input channel per group"),
    (
        "grouped",
        lambda: nn.Conv2d(32, 64, 3, groups=4),
        Code.GROUPED,
        "per group must be at least 16 .* 8 and 16",
    ),
    ("grouped_out", lambda: nn.Conv2d(64, 16, 3, groups=4), Code.GROUPED, "per group 8, got 16 and 4"),
    ("float64", lambda: linear().double(), Code.DTYPE, "must be float32, float16 or bfloat16, got float64"),
    (
        "bias_dtype",
        lambda: with_(linear(), lambda m: setattr(m, "bias", nn.Parameter(m.bias.data.half()))),
        Code.DTYPE,
        "must have one dtype, got float16 and float32",
    ),
    ("complex", lambda: linear().to(torch.complex64), Code.COMPLEX, "complex64"),
    ("meta", lambda: nn.Linear(64, 64, device="meta"), Code.META_DEVICE, "load the weights, then convert"),
    ("lazy", lambda: nn.LazyLinear(64), Code.LAZY, "run the model once"),
    ("lazy_conv", lambda: nn.LazyConv2d(64, 3), Code.LAZY, "run the model once"),
    ("quantized", lambda: torch.ao.nn.quantized.Linear(64, 64), Code.QUANTIZED, "quantized"),
    ("tensor_subclass", subclass_weight, Code.TENSOR_KIND, "not an ordinary dense tensor but Tagged"),
    (
        "csr",
        lambda: with_(linear(), lambda m: setattr(m, "weight", nn.Parameter(torch.eye(64).to_sparse_csr()))),
        Code.TENSOR_KIND,
        "sparse_csr",
    ),
    (
        "weight_norm",
        lambda: parametrizations.weight_norm(linear()),
        Code.PARAMETRIZED,
        "remove_parametrizations",
    ),
    (
        "spectral_norm",
        lambda: parametrizations.spectral_norm(nn.Conv2d(16, 16, 3)),
        Code.PARAMETRIZED,
        "computed",
    ),
    ("old_weight_norm", lambda: weight_norm(linear()), Code.PARAMETRIZED, "remove_weight_norm"),
    ("old_spectral_norm", lambda: spectral_norm(linear()), Code.PARAMETRIZED, "remove_spectral_norm"),
    (
        "bias_norm",
        lambda: with_(linear(), lambda m: parametrize.register_parametrization(m, "bias", nn.Identity())),
        Code.PARAMETRIZED,
        "remove_parametrizations",
    ),
    (
        "prune_mask",
        lambda: prune.l1_unstructured(linear(), "weight", 0.5),
        Code.PARAMETRIZED,
        "utils.prune.remove",
    ),
    (
        "own_forward",
        lambda: OwnForward(64, 64),
        Code.SUBCLASS,
        "OwnForward is a Linear that defines forward of its",
    ),
    (
        "qat",
        lambda: torch.ao.nn.qat.Linear(64, 64, qconfig=torch.ao.quantization.default_qat_qconfig),
        Code.SUBCLASS,
        "defines .*forward",
    ),
    ("compiled", compiled_in_place, Code.PATCHED, "convert first, compile then"),
    ("patched", patched, Code.PATCHED, "its forward was replaced on the instance"),
    (
        "extra_buffer",
        lambda: with_(linear(), lambda m: m.register_buffer("scale", torch.ones(1))),
        Code.EXTRA_STATE,
        "it holds scale besides",
    ),
    (
        "extra_module",
        lambda: with_(linear(), lambda m: m.add_module("lora", nn.Linear(64, 4))),
        Code.EXTRA_STATE,
        "it holds lora besides",
    ),
    (
        "state_dict_hook",
        lambda: with_(linear(), lambda m: m.register_state_dict_post_hook(lambda *_: None)),
        Code.HOOKS,
        "it has state-dict hooks",
    ),
    (
        "load_hook",
        lambda: with_(linear(), lambda m: m.register_load_state_dict_pre_hook(lambda *_: None)),
        Code.HOOKS,
        "it has load-state-dict hooks",
    ),
    (
        "grad_hook",
        lambda: with_(linear(), lambda m: m.weight.register_hook(lambda g: g)),
        Code.HOOKS,
        "gradient hooks on its weight",
    ),
    (
        "conv_transpose",
        lambda: nn.ConvTranspose2d(32, 32, 3),
        Code.KIND,
        "no sparse module for ConvTranspose2d",
    ),
    ("conv3d", lambda: nn.Conv3d(32, 32, 3), Code.KIND, "no sparse module for Conv3d"),
    ("rnn", lambda: nn.RNN(32, 32), Code.KIND, "no sparse module for RNN"),
    (
        "lstm_projection",
        lambda: nn.LSTM(64, 64, proj_size=32),
        Code.KIND,
        "must have no projection, got proj_size 32",
    ),
    (
        "lstm_in",
        lambda: nn.LSTM(31, 32),
        Code.TOO_SMALL,
        "input_size and hidden_size must be at least 32, got 31 and 32",
    ),
    ("gru_hidden", lambda: nn.GRU(32, 31), Code.TOO_SMALL, "at least 32, got 32 and 31"),
    (
        "lstm_float64",
        lambda: nn.LSTM(64, 64).double(),
        Code.DTYPE,
        "must be float32, float16 or bfloat16, got float64",
    ),
    (
        "lstm_old_weight_norm",
        lambda: weight_norm(nn.LSTM(64, 64), "weight_hh_l0"),
        Code.PARAMETRIZED,
        "remove_weight_norm",
    ),
    (
        "lstm_extra",
        lambda: with_(nn.LSTM(64, 64), lambda m: m.register_buffer("scale", torch.ones(1))),
        Code.EXTRA_STATE,
        "it holds scale besides",
    ),
    (
        "lstm_grad_hook",
        lambda: with_(nn.LSTM(64, 64), lambda m: m.weight_hh_l0.register_hook(lambda g: g)),
        Code.HOOKS,
        "gradient hooks on its weight",
    ),
    ("gru_cell", lambda: nn.GRUCell(32, 32), Code.KIND, "no sparse module for GRUCell"),
    ("bilinear", lambda: nn.Bilinear(32, 32, 32), Code.KIND, "no sparse module for Bilinear"),
    ("embedding", lambda: nn.Embedding(32, 32), Code.KIND, "no 2:4 module for Embedding"),
    ("embedding_bag", lambda: nn.EmbeddingBag(32, 32), Code.KIND, "no sparse module for EmbeddingBag"),
    (
        "groups_not_divisible",
        lambda: with_(nn.Conv2d(64, 64, 3, groups=2), lambda m: setattr(m, "groups", 3)),
        Code.GROUPED,
        "groups must divide the output channels, got 3 for 64",
    ),
]


@pytest.mark.parametrize(
    ("make", "code", "sentence"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|quantized tensor|Complex modules):UserWarning")
def test_layer_stays_dense_with_its_reason(make, code, sentence):
    model = nn.Sequential(nn.ReLU(), make(), nn.Linear(64, 64))
    layer = model[1]
    for report in (sparseops.explain(model), sparseops.explain(sparseops.convert(model, inplace=True))):
        row = report["1"]
        assert row.code is code
        assert re.search(sentence, row.reason), row.reason
        assert row.bytes_before == row.bytes_after
        assert row.kernel == row.format == ""
    assert model[1] is layer
    assert type(model[2]) is SparseLinear, "one layer's reason must not keep its neighbours"


def codes(model):
    return {row.name: row.code for row in sparseops.explain(model)}


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(32, 8),
        lambda: nn.Conv1d(16, 8, 3),
        lambda: nn.Conv2d(16, 8, 1),
        lambda: nn.Conv2d(32, 16, 3, groups=2),
        lambda: OnlyNamed(64),
        lambda: linear().half(),
        lambda: linear().bfloat16(),
        lambda: nn.LSTM(32, 32),
        lambda: nn.GRU(32, 32, num_layers=2, bidirectional=True),
    ],
)
def test_smallest_layers_that_are_converted(make):
    model = nn.Sequential(make())
    assert codes(model) == {"0": Code.ELIGIBLE}
    assert codes(sparseops.convert(model)) == {"0": Code.CONVERTED}


def test_every_dense_code_is_tested():
    tested = {case[2] for case in CASES}
    elsewhere = {Code.EXCLUDED, Code.SLOWER, Code.WEIGHT_READ, Code.TORCHSCRIPT, Code.SHARED_WEIGHT}
    elsewhere |= {Code.WHOLE, Code.UNSTRUCTURED}  # of other patterns
    outcomes = {Code.CONVERTED, Code.ALREADY_SPARSE, Code.ELIGIBLE}
    assert tested | elsewhere | outcomes == set(Code)
    assert all(code.explanation for code in Code)


def test_multihead_attention_reads_its_projection():
    model = nn.MultiheadAttention(64, 4, batch_first=True)
    with pytest.warns(UserWarning, match="1 kind, 1 weight_read"):
        assert sparseops.convert(model) is model
    assert codes(model) == {"": Code.KIND, "out_proj": Code.WEIGHT_READ}
    assert "MultiheadAttention reads its weight" in sparseops.explain(model)["out_proj"].reason


def test_transformer_encoder_layer_reads_its_weights_on_the_fast_path():
    model = nn.Sequential(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), nn.Linear(64, 64)).eval()
    sparse = sparseops.convert(model)
    assert {name for name, code in codes(sparse).items() if code is Code.WEIGHT_READ} == {
        "0.self_attn.out_proj",
        "0.linear1",
        "0.linear2",
    }
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), sparseops.to_dense(sparse)(x))


def test_transformer_decoder_layer_is_converted():
    model = sparseops.convert(nn.TransformerDecoderLayer(64, 4, 128, batch_first=True).eval())
    assert type(model.linear1) is SparseLinear
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(model(x, x), sparseops.to_dense(model)(x, x))


def test_tied_weights_stay_tied():
    model = nn.Sequential(Tied(), nn.Linear(64, 64))
    sparse = sparseops.convert(model)
    assert sparse[0].head.weight is sparse[0].embed.weight
    row = sparseops.explain(sparse)["0.head"]
    assert row.code is Code.SHARED_WEIGHT
    assert row.reason == "weight of Embedding uses the same weight"


def test_two_layers_with_one_weight_stay_dense():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    assert codes(sparseops.convert(model)) == {
        "0": Code.SHARED_WEIGHT,
        "1": Code.SHARED_WEIGHT,
        "2": Code.CONVERTED,
    }


def test_recurrent_layers_with_a_common_weight_stay_dense():
    model = nn.ModuleList([nn.LSTM(64, 64), nn.LSTM(64, 64), nn.LSTM(64, 64)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    model[2].bias_ih_l0 = model[0].bias_ih_l0
    sparse = sparseops.convert(model)
    assert codes(sparse) == {"0": Code.SHARED_WEIGHT, "1": Code.SHARED_WEIGHT, "2": Code.CONVERTED}
    assert sparseops.explain(model)["0"].reason == "weight_hh_l0 of LSTM uses the same weight"
    assert sparse[1].weight_hh_l0 is sparse[0].weight_hh_l0
    assert sparse[2].bias_ih_l0 is sparse[0].bias_ih_l0


def test_weights_in_one_storage_are_shared_only_if_they_overlap():
    assert codes(Views(64 * 64)) == {"a": Code.ELIGIBLE, "b": Code.ELIGIBLE}
    assert codes(Views(64)) == {"a": Code.SHARED_WEIGHT, "b": Code.SHARED_WEIGHT}
    within = Views(64 * 64)
    within.register_buffer("flat", within.a.weight.data.new_empty(0).set_(within.a.weight.untyped_storage()))
    assert codes(within) == {"a": Code.SHARED_WEIGHT, "b": Code.SHARED_WEIGHT}
    flat = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(flat.parameters()), flat.parameters()
    )
    assert set(codes(flat).values()) == {Code.ELIGIBLE}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_children_of_a_torchscript_module_stay():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(64, 64)))
    model = nn.Sequential(scripted, nn.Linear(64, 64))
    sparse = sparseops.convert(model, inplace=True)
    report = sparseops.explain(sparse)
    assert report["0.0"].code is Code.TORCHSCRIPT
    assert report["0.0"].kind == "Linear"
    assert "before scripting" in report["0.0"].reason
    assert type(sparse[1]) is SparseLinear
    assert sparse(torch.randn(2, 64)).shape == (2, 64)


def test_looking_does_not_compute_a_parametrized_weight():
    layer = parametrizations.spectral_norm(
        nn.Linear(64, 64)
    ).train()  # each look would move its power iteration
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert codes(nn.Sequential(layer)) == {"0": Code.PARAMETRIZED}
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_pruned_layer_is_converted_after_the_cure():
    layer = prune.custom_from_mask(nn.Linear(64, 64), "weight", torch.tensor([1.0, 0, 1, 0]).repeat(64, 16))
    assert codes(nn.Sequential(layer)) == {"0": Code.PARAMETRIZED}
    prune.remove(layer, "weight")
    row = sparseops.explain(sparseops.convert(nn.Sequential(layer), prune=None))["0"]
    assert row.code is Code.CONVERTED
    assert row.energy_kept == 1.0


def test_distributed_wrapper_is_refused():
    class Wrapper(nn.parallel.DistributedDataParallel):
        def __init__(self):  # no process group in a test
            nn.Module.__init__(self)

    with pytest.raises(TypeError, match=r"convert: model must be unwrapped \(pass model.module\), got Distr"):
        sparseops.convert(Wrapper())
