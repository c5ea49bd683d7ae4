"""One test per message: a bad argument is one sentence, never a crash or a wrong answer."""

import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseops import _native, env
from sparseops.formats import NM24
from sparseops.ops import (
    REGISTRY,
    nm24_compress,
    nm24_conv,
    nm24_grad_values,
    nm24_linear,
    nm24_linear_f8,
    nm24_linear_i8,
    nm24_to_dense,
    registry,
)

WEIGHT = NM24.from_dense(torch.randn(6, 40), prune="magnitude")
KERNEL = NM24.from_dense(torch.randn(6, 5, 3, 2), prune="magnitude")
X, IMAGE, BIAS = torch.randn(3, 40), torch.randn(2, 5, 7, 8), torch.randn(6)


def linear(x=X, values=WEIGHT.values, meta=WEIGHT.meta, bias=BIAS, **options):
    return nm24_linear(x, values, meta, bias, **options)


def conv(x=IMAGE, values=KERNEL.values, meta=KERNEL.meta, bias=BIAS, kernel_size=(3, 2), **options):
    return nm24_conv(x, values, meta, bias, kernel_size=kernel_size, **options)


@pytest.fixture(params=["fast", "dispatcher", "fake"])
def path(request, monkeypatch):
    """Every way a call can take must say the same."""
    if request.param != "fast":
        monkeypatch.setattr(registry, "FAST", False)
    if request.param != "fake":
        yield request.param
        return
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield request.param


SHARED = [
    (
        {"values": WEIGHT.values.bfloat16()},
        TypeError,
        r"values must have the dtype of x \(torch.float32\), got torch.bf",
    ),
    ({"meta": WEIGHT.meta.int()}, TypeError, "meta must have dtype torch.uint8, got torch.int32"),
    ({"bias": BIAS.half()}, TypeError, r"bias must have the dtype of x \(torch.float32\), got torch.float16"),
    (
        {"values": torch.randn(6)},
        ValueError,
        r"values must have shape \[O, P/2\], P divisible by 32, got \(6,\)",
    ),
    ({"values": torch.randn(6, 20)}, ValueError, r"P divisible by 32, got \(6, 20\)"),
    ({"meta": WEIGHT.meta[:5]}, ValueError, r"meta must have shape \(6, 8\), got \(5, 8\)"),
    ({"meta": WEIGHT.meta[:, :6]}, ValueError, r"meta must have shape \(6, 8\), got \(6, 6\)"),
    ({"bias": torch.randn(5)}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
    ({"bias": torch.randn(6, 1)}, ValueError, r"bias must have shape \(6,\), got \(6, 1\)"),
    ({"activation": "tanh"}, ValueError, "activation must be one of none, relu, silu, gelu, got 'tanh'"),
]
LINEAR = [
    *SHARED,
    ({"x": X.int()}, TypeError, r"x must be a floating-point tensor \(16, 32 or 64 bits\), got torch.int32"),
    ({"x": X.to(torch.complex64)}, TypeError, "x must be a floating-point tensor .*, got torch.complex64"),
    ({"x": X[0, 0]}, ValueError, "x must have at least one dimension, got a scalar"),
    (
        {"x": X[:, :32]},
        ValueError,
        "x must have 33 to 64 features to match values of 64 packed columns, got 32",
    ),
    ({"x": torch.randn(2, 3, 65)}, ValueError, "x must have 33 to 64 features .*, got 65"),
    ({"x": X[:, :0]}, ValueError, "x must have 33 to 64 features .*, got 0"),
]
CONV = [
    (
        {"x": IMAGE.double()},
        TypeError,
        r"values must have the dtype of x \(torch.float64\), got torch.float32",
    ),
    ({"x": IMAGE.long()}, TypeError, "x must be a floating-point tensor .*, got torch.int64"),
    ({"x": IMAGE[0, 0]}, ValueError, r"x must have shape \[N, C, H, W\] or \[C, H, W\], got \(7, 8\)"),
    (
        {"x": torch.randn(2, 9, 7, 8)},
        ValueError,
        r"x must have channels .* 64 packed columns, got 9 channels \(96 col",
    ),
    (
        {"x": torch.randn(2, 0, 7, 8)},
        ValueError,
        "groups must be at least 1 and divide the channels .* got 1 for 0",
    ),
    ({"kernel_size": 3}, ValueError, r"got 5 channels \(96 columns with groups=1, kernel_size=\(3, 3\)\)"),
    ({"kernel_size": (3, 0)}, ValueError, r"kernel_size must be at least 1, got \(3, 0\)"),
    ({"stride": 0}, ValueError, r"stride must be at least 1, got \(0, 0\)"),
    ({"stride": (1, -2)}, ValueError, r"stride must be at least 1, got \(1, -2\)"),
    ({"padding": (0, -1)}, ValueError, r"padding must be at least 0, got \(0, 0, -1, -1\)"),
    ({"dilation": 0}, ValueError, r"dilation must be at least 1, got \(0, 0\)"),
    (
        {"padding": 2**31},
        ValueError,
        r"padding must keep the padded x below 2\*\*31 rows and columns, got 4294967303",
    ),
    (
        {"padding": "full"},
        ValueError,
        'padding must be an int, a pair of ints, "same" or "valid", got \'full\'',
    ),
    (
        {"padding": "same", "stride": (2, 1)},
        ValueError,
        r'stride must be 1 with padding="same", got \(2, 1\)',
    ),
    ({"padding": (1, 1, 1, 1)}, TypeError, r"padding must be an int or a pair of ints, got \(1, 1, 1, 1\)"),
    ({"stride": 1.5}, TypeError, "stride must be an int or a pair of ints, got 1.5"),
    ({"dilation": None}, TypeError, "dilation must be an int or a pair of ints, got None"),
    ({"kernel_size": ("3", 2)}, TypeError, "kernel_size must be an int or a pair of ints"),
    (
        {"groups": 0},
        ValueError,
        "groups must be at least 1 and divide the channels in and out, got 0 for 5 and 6",
    ),
    ({"groups": 2}, ValueError, "groups must .* got 2 for 5 and 6"),
    ({"groups": 5}, ValueError, "groups must .* got 5 for 5 and 6"),
    ({"x": IMAGE[:, :, :2]}, ValueError, "x must have a height .* got 2 padded to 2 for an extent of 3"),
    (
        {"dilation": (1, 8)},
        ValueError,
        "x must have a height and width .* got 8 padded to 8 for an extent of 9",
    ),
    (
        {"x": IMAGE[:, :, :0], "padding": 3},
        ValueError,
        "x must have a height .* got 0 padded to 6 for an extent of 3",
    ),
    ({"x": IMAGE[0, :, :2]}, ValueError, "x must have a height .* got 2 padded to 2"),
]


@pytest.mark.parametrize(("arguments", "error", "match"), LINEAR)
def test_nm24_linear(arguments, error, match, path):
    with pytest.raises(error, match=f"^nm24_linear: .*{match}"):
        linear(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "match"), [case for case in SHARED if not {"values", "meta"} & set(case[0])] + CONV
)
def test_nm24_conv(arguments, error, match, path):
    with pytest.raises(error, match=f"^nm24_conv: .*{match}"):
        conv(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (
            (WEIGHT.values.int(), WEIGHT.meta),
            TypeError,
            "values must be a floating-point tensor .*, got torch.int32",
        ),
        ((WEIGHT.values, WEIGHT.meta.long()), TypeError, "meta must have dtype torch.uint8, got torch.int64"),
        (
            (WEIGHT.values[:, :8], WEIGHT.meta),
            ValueError,
            r"values must have shape \[O, P/2\], .* got \(6, 8\)",
        ),
        ((WEIGHT.values, WEIGHT.meta[:1]), ValueError, r"meta must have shape \(6, 8\), got \(1, 8\)"),
    ],
)
def test_nm24_to_dense(arguments, error, match, path):
    with pytest.raises(error, match=f"^nm24_to_dense: .*{match}"):
        nm24_to_dense(*arguments)


RESIDUAL = [
    (linear, {"residual": torch.randn(3, 7)}, ValueError, r"must have shape \(3, 6\), got \(3, 7\)"),
    (linear, {"residual": torch.randn(6)}, ValueError, r"must have shape \(3, 6\), got \(6,\)"),
    (linear, {"residual": torch.randn(3, 6).half()}, TypeError, r"must have the dtype of x \(torch.float32"),
    (
        conv,
        {"residual": torch.randn(6, 5, 7)},
        ValueError,
        r"must have shape \(2, 6, 5, 7\), got \(6, 5, 7\)",
    ),
    (conv, {"residual": torch.randn(2, 6, 5, 7).double()}, TypeError, "must have the dtype of x"),
    (
        linear,
        {"residual": torch.ones(3, 6, device="meta")},
        ValueError,
        r"must be on the device of x \(cpu\)",
    ),
]


@pytest.mark.parametrize(("fn", "arguments", "error", "match"), RESIDUAL)
def test_residual(fn, arguments, error, match, path):
    with pytest.raises(error, match=f"^nm24_.*: residual {match}"):
        fn(**arguments)


INT8 = {
    "x": torch.ones(3, 40, dtype=torch.int8),
    "values": WEIGHT.values.to(torch.int8),
    "meta": WEIGHT.meta,
    "x_scale": torch.ones(3),
    "w_scale": torch.ones(6),
    "bias": BIAS,
}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"x": X}, TypeError, "x must have dtype torch.int8, got torch.float32"),
        ({"values": WEIGHT.values}, TypeError, "values must have dtype torch.int8, got torch.float32"),
        ({"meta": WEIGHT.meta.int()}, TypeError, "meta must have dtype torch.uint8, got torch.int32"),
        ({"x_scale": torch.ones(3).half()}, TypeError, "x_scale must have dtype torch.float32, got torch.fl"),
        (
            {"w_scale": torch.ones(6).double()},
            TypeError,
            "w_scale must have dtype torch.float32, got torch.f",
        ),
        ({"bias": BIAS.half()}, TypeError, "bias must have dtype torch.float32, got torch.float16"),
        (
            {"out_dtype": torch.float64},
            TypeError,
            "out_dtype must be one of torch.float32, torch.float16, torch.bfloat16, got torch.float64",
        ),
        ({"x": INT8["x"][0, 0]}, ValueError, "x must have at least one dimension, got a scalar"),
        ({"x": INT8["x"][:, :32]}, ValueError, "x must have 33 to 64 features .*, got 32"),
        (
            {"values": INT8["values"][:, :20]},
            ValueError,
            r"values must have shape \[O, P/2\], .* got \(6, 20",
        ),
        ({"meta": WEIGHT.meta[:5]}, ValueError, r"meta must have shape \(6, 8\), got \(5, 8\)"),
        ({"x_scale": torch.ones(2)}, ValueError, r"x_scale must have shape \(3,\) or \(1,\), got \(2,\)"),
        ({"w_scale": torch.ones(5)}, ValueError, r"w_scale must have shape \(6,\), got \(5,\)"),
        ({"bias": torch.ones(1)}, ValueError, r"bias must have shape \(6,\), got \(1,\)"),
        ({"activation": "tanh"}, ValueError, "activation must be one of none, relu, silu, gelu, got 'tanh'"),
        (
            {"w_scale": torch.ones(6, device="meta")},
            ValueError,
            r"w_scale must be on the device of x \(cpu\)",
        ),
    ],
)
@pytest.mark.parametrize(
    ("op", "dtype"), [(nm24_linear_i8, torch.int8), (nm24_linear_f8, torch.float8_e4m3fn)]
)
def test_8_bit_products(op, dtype, arguments, error, match, path):
    given = {**INT8, "out_dtype": torch.float32, **arguments}
    given |= {name: t.to(dtype) for name, t in given.items() if getattr(t, "dtype", None) is torch.int8}
    match = match.replace(str(torch.int8), str(dtype))
    with pytest.raises(error, match=f"^{op.__name__}: .*{match}"):
        op(**given)


def test_how_many_features_sums_of_integers_hold():
    features = 2**17 + 1
    x, meta = torch.ones(1, features, dtype=torch.int8), torch.full((1, 2**14 + 4), 0x44, dtype=torch.uint8)
    values, scale = torch.ones(1, 2**16 + 16, dtype=torch.int8), torch.ones(1)
    with pytest.raises(ValueError, match="columns, and at most 131072, got 131073$"):
        nm24_linear_i8(x, values, meta, scale, scale, out_dtype=torch.float32)
    x, values = x.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
    assert nm24_linear_f8(x, values, meta, scale, scale, out_dtype=torch.float32) == 2**16 + 1
    with pytest.raises(
        ValueError, match="131073 to 131104 features to match values of 131104 packed columns, got 1$"
    ):
        nm24_linear_f8(x[:, :1], values, meta, scale, scale, out_dtype=torch.float32)


@pytest.mark.parametrize(
    ("packed", "error", "match"),
    [
        (torch.ones(2, 32).int(), TypeError, "packed must be a floating-point tensor .*, got torch.int32"),
        (torch.ones(2, 40), ValueError, r"packed must have shape \[O, P\], P divisible by 32, got \(2, 40\)"),
        (torch.ones(32), ValueError, r"packed must have shape \[O, P\], .* got \(32,\)"),
    ],
)
def test_nm24_compress(packed, error, match, path):
    with pytest.raises(error, match=f"^nm24_compress: {match}"):
        nm24_compress(packed)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (
            {"grad": torch.ones(3, 6).int()},
            TypeError,
            "grad must be a floating-point tensor .*, got torch.int",
        ),
        ({"x": X.half()}, TypeError, r"x must have the dtype of grad \(torch.float32\), got torch.float16"),
        ({"meta": WEIGHT.meta.int()}, TypeError, "meta must have dtype torch.uint8, got torch.int32"),
        ({"grad": torch.ones(6)}, ValueError, r"grad must have shape \[tokens, O\], got \(6,\)"),
        ({"x": X[:2]}, ValueError, r"x must have shape \[3, K\], got \(2, 40\)"),
        ({"x": X[:, :32]}, ValueError, r"meta must have shape \(6, 4\), got \(6, 8\)"),
        (
            {"meta": WEIGHT.meta.to("meta")},
            ValueError,
            r"meta must be on the device of grad \(cpu\), got meta",
        ),
    ],
)
def test_nm24_grad_values(arguments, error, match, path):
    with pytest.raises(error, match=f"^nm24_grad_values: {match}"):
        nm24_grad_values(**{"grad": torch.ones(3, 6), "x": X, "meta": WEIGHT.meta, **arguments})


@pytest.mark.parametrize("name", ["x", "values", "meta", "bias"])
def test_every_tensor_on_one_device(name, path):
    rule = "values must be on the device of x (meta), got cpu"
    if name != "x":
        rule = f"{name} must be on the device of x (cpu), got meta"
    for fn, x, weight in ((linear, X, WEIGHT), (conv, IMAGE, KERNEL)):
        tensors = {"x": x, "values": weight.values, "meta": weight.meta, "bias": BIAS}
        with pytest.raises(ValueError, match=f"^nm24_.*: {re.escape(rule)}"):
            fn(**{name: tensors[name].to("meta")})
    rule = re.escape("meta must be on the device of values (cpu), got meta")
    with pytest.raises(ValueError, match=f"^nm24_to_dense: {rule}"):
        nm24_to_dense(WEIGHT.values, WEIGHT.meta.to("meta"))


def test_registering_a_name_twice():
    with pytest.raises(ValueError, match="^register: op must have a name of its own, got 'nm24_conv' again"):
        registry.register(REGISTRY["nm24_conv"])


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr(registry, "_warned", set())


def test_a_dtype_without_kernel_is_said_once(nothing_said):
    double = {"values": WEIGHT.values.double(), "bias": BIAS.double()}
    with pytest.warns(UserWarning) as said:
        y = linear(X.double(), **double)
        linear(X.double(), **double)
    assert [str(w.message) for w in said] == [
        "nm24_linear: there is no kernel for torch.float64; its plain torch reference runs instead"
    ]
    torch.testing.assert_close(y.float(), linear())


def test_a_missing_module_is_said_once(nothing_said, monkeypatch):
    y = conv()
    monkeypatch.setattr(registry, "FAST", False)
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "error", "the source tree at /here has no built module: run it")
    with pytest.warns(
        UserWarning, match="^nm24_conv: the source tree at /here has no built module: run it; its"
    ):
        torch.testing.assert_close(conv(), y)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*plain torch reference")
        conv()
    with pytest.raises(
        RuntimeError, match="^nm24_conv: no kernel can run, the source tree at /here has no built"
    ):
        _native.require("nm24_conv")


def test_a_bad_variable_is_an_error_when_a_kernel_is_asked_for(monkeypatch):
    monkeypatch.setattr(registry, "FAST", False)
    monkeypatch.setattr(_native, "config_error", "SPARSEOPS_FAST_PATH must be 0 or 1, got 'yes'")
    for fn in (linear, conv):
        with pytest.raises(ValueError, match="^SPARSEOPS_FAST_PATH must be 0 or 1, got 'yes'$"):
            fn()
    assert REGISTRY["nm24_linear"].supports(X) == _native.config_error
    with pytest.raises(ValueError, match="^SPARSEOPS_FAST_PATH must be 0 or 1"):
        _native.require("nm24_linear")


@pytest.mark.parametrize(
    ("read", "variable", "value", "message", "default"),
    [
        (
            env.cpu_isa,
            "SPARSEOPS_CPU_ISA",
            "sse9",
            "SPARSEOPS_CPU_ISA must be one of portable, avx2, avx512, avx512_bf16, got 'sse9'",
            None,
        ),
        (env.fast_path, "SPARSEOPS_FAST_PATH", "yes", "SPARSEOPS_FAST_PATH must be 0 or 1, got 'yes'", True),
        (
            env.emulate,
            "SPARSEOPS_EMULATE",
            "8.6",
            "SPARSEOPS_EMULATE must be one of 0, 1, 8.0, 9.0, got '8.6'",
            None,
        ),
        (
            env.impl,
            "SPARSEOPS_IMPL",
            "huge",
            "SPARSEOPS_IMPL must be one of auto, few8, few16, small, large, sm90_128x8, sm90_128x16, "
            "sm90_128x32, sm90_128x64, sm90_128x128, sm90_128x256, sm90_256x128, sm90_192x192, "
            "sm90_rs_128x256, sm90_rs_256x128, triton, dense, got 'huge'",
            "auto",
        ),
    ],
)
def test_bad_variables(read, variable, value, message, default, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError) as refused:
        read()
    assert str(refused.value) == message
    assert _native._configure(_native.C) == _native.Config(fast_path=False, error=message)
    monkeypatch.setenv(variable, "")
    assert read() == default


def test_an_instruction_set_that_cannot_run_here(monkeypatch):
    monkeypatch.setenv("SPARSEOPS_CPU_ISA", "avx512")
    module = SimpleNamespace(cpu_supports=lambda isa: isa in ("portable", "avx2"))
    assert _native._configure(module) == _native.Config(
        fast_path=False,
        error="SPARSEOPS_CPU_ISA must name an instruction set that was built and that this processor has "
        "(portable, avx2), got 'avx512'",
    )


def test_why_there_is_no_module(monkeypatch):
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: None)
    module, reason = _native._load(emulate=False)
    assert module is None
    assert "has no built module" in reason and "pip install" in reason


def test_the_module_of_another_tree_is_not_taken(monkeypatch, tmp_path):
    found = SimpleNamespace(origin=str(tmp_path / "sparseops" / "_C.so"))
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: found)
    module, reason = _native._load(emulate=False)
    assert module is None
    assert "has no built module" in reason


def test_why_the_module_cannot_be_imported(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr(_native.importlib, "import_module", broken)
    module, reason = _native._load(emulate=False)
    assert module is None
    assert "cannot be imported (undefined symbol: x): reinstall sparseops" in reason


CHILD = """
import torch
from sparseops import _native
from sparseops.formats import NM24
from sparseops.ops import nm24_linear, registry
weight = NM24.from_dense(torch.randn(4, 8), prune="magnitude")
try:
    nm24_linear(torch.randn(2, 8), weight.values, weight.meta)
    print(_native.C.cpu_isa(), registry.FAST)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("variables", "printed"),
    [
        ({"SPARSEOPS_CPU_ISA": "portable"}, "portable True"),
        ({"SPARSEOPS_CPU_ISA": "portable", "SPARSEOPS_FAST_PATH": "0"}, "portable False"),
        ({"SPARSEOPS_CPU_ISA": "portable", "SPARSEOPS_IMPL": "few8"}, "portable True"),
        ({"SPARSEOPS_IMPL": "few9"}, "SPARSEOPS_IMPL must be one of .*, got 'few9'"),
        ({"SPARSEOPS_EMULATE": "on"}, "SPARSEOPS_EMULATE must be one of 0, 1, 8.0, 9.0, got 'on'"),
        ({"SPARSEOPS_FAST_PATH": "2"}, "SPARSEOPS_FAST_PATH must be 0 or 1, got '2'"),
        ({"SPARSEOPS_CPU_ISA": "AVX2"}, "SPARSEOPS_CPU_ISA must be one of .*, got 'AVX2'"),
    ],
)
def test_variables_take_effect(variables, printed):
    ours = {name: value for name, value in os.environ.items() if not name.startswith("SPARSEOPS_")}
    child = subprocess.run(
        [sys.executable, "-c", CHILD], env={**ours, **variables}, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(printed, child.stdout.strip())


def test_the_variables_that_are_set(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SPARSEOPS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SPARSEOPS_FAST_PATH", "1")
    monkeypatch.setenv("SPARSEOPS_TYPO", "x")
    assert env.variables() == {"SPARSEOPS_FAST_PATH": "1", "SPARSEOPS_TYPO": "x"}
