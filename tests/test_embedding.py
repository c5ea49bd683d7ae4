"""Embeddings without some of their columns: the same rows, and everything people do to a module."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from sparseops.formats import Keep
from sparseops.nn import SparseEmbedding, SparseLinear, SparseModule

ROWS, COLUMNS = 50, 19
KEPT = [0, 1, 2, 3, 4, 5, 6, 7, 9, 16, 18]
OPTIONS = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "negative_padding": {"padding_idx": -1},
    "max_norm": {"max_norm": 1.5},
    "max_norm_1": {"max_norm": 4.0, "norm_type": 1.0},
    "by_frequency": {"scale_grad_by_freq": True},
    "sparse": {"sparse": True, "padding_idx": 0},
}
every_option = pytest.mark.parametrize("option", OPTIONS)


def make(option="plain", dtype=torch.float64):
    torch.manual_seed(0)
    dense = nn.Embedding(ROWS, COLUMNS, dtype=dtype, **OPTIONS[option])
    with torch.no_grad():
        for column in set(range(COLUMNS)) - set(KEPT):
            dense.weight[:, column] = 0
    return SparseEmbedding.from_dense(dense), dense


def tokens(*shape):
    return torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(), (7,), (4, 30), (2, 3, 4), (0,), (2, 0)], ids=str)
@every_option
def test_forward_equals_dense(option, shape):
    sparse, dense = make(option)
    found, expected = sparse(tokens(*shape)), dense(tokens(*shape))
    eps = 1e-15 if dense.max_norm else 0.0
    torch.testing.assert_close(found, expected, rtol=eps, atol=0)
    assert found.is_contiguous()
    torch.testing.assert_close(sparse.weight, dense.weight, rtol=eps, atol=0)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, index):
    sparse, dense = make(dtype=dtype)
    assert torch.equal(sparse(tokens(5).to(index)), dense(tokens(5).to(index)))


@every_option
def test_gradients_equal_dense(option):
    sparse, dense = make(option)
    slopes = torch.randn(40, COLUMNS, dtype=torch.float64)
    for layer in (sparse, dense):
        (layer(tokens(40)) * slopes).sum().backward()
    found, expected = sparse.values.grad, dense.weight.grad
    assert found.is_sparse == expected.is_sparse == (option == "sparse")
    torch.testing.assert_close(found.to_dense(), expected.to_dense()[:, KEPT])


def test_training_keeps_the_columns():
    sparse, _ = make("padding")
    optimizer = torch.optim.Adam(sparse.parameters(), 0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (sparse(tokens(20)) - 1).square().mean().backward()
        optimizer.step()
    assert not sparse.weight[:, [8, 10, 17]].any()
    assert sparse.weight[:, KEPT].any(0).all()


def test_matrix_factorisation():
    """Two tables and the inner product of their rows, and a linear layer that reads both."""
    torch.manual_seed(0)
    users, items, head = nn.Embedding(30, 32), nn.Embedding(40, 32), nn.Linear(64, 8)
    sparse = [SparseEmbedding.from_dense(table, prune="magnitude") for table in (users, items)]
    dense = [table.to_dense() for table in sparse]
    narrow = SparseLinear.from_dense(head, prune="magnitude")
    u, i = torch.arange(20), torch.arange(20, 40)
    results = []
    for tables, last in ((sparse, narrow), (dense, narrow.to_dense())):
        rows = tables[0](u), tables[1](i)
        results.append(((rows[0] * rows[1]).sum(-1), last(torch.cat(rows, -1))))
    torch.testing.assert_close(results[0], results[1])
    assert [table.values.shape for table in sparse] == [(30, 16), (40, 16)]


@every_option
def test_attributes_and_dense_layer(option):
    sparse, dense = make(option)
    for name in SparseEmbedding.hyperparameters:
        assert getattr(sparse, name) == getattr(dense, name)
    assert isinstance(sparse, SparseModule)
    assert sparse.weight_shape == (ROWS, COLUMNS)
    back = sparse.eval().to_dense()
    assert type(back) is nn.Embedding
    assert not back.training
    assert repr(back) == repr(dense)
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(back(tokens(9)), dense(tokens(9)))
    with torch.no_grad():
        back.weight.zero_()
    assert sparse.weight.any()
    details = f"format=channel, density={sparse.packed.density:.3g}, kernel={sparse.kernel}"
    assert repr(sparse) == f"Sparse{repr(dense)[:-1]}, {details})"
    assert sparse.kernel == "torch.embedding on the kept columns"
    assert sparse.kernel_note is None


def test_frozen_layer_stays_frozen():
    _, dense = make()
    dense.weight.requires_grad_(False)
    sparse = SparseEmbedding.from_dense(dense.eval())
    assert not sparse.values.requires_grad
    assert not sparse.training
    assert not sparse.to_dense().weight.requires_grad


def test_new_layer_is_dense_init_pruned():
    torch.manual_seed(3)
    dense = nn.Embedding(ROWS, 32, padding_idx=2)
    torch.manual_seed(3)
    sparse = SparseEmbedding(ROWS, 32, padding_idx=2)
    assert sparse.in_index.dtype == torch.int32
    assert len(sparse.in_index) == 16
    best = dense.weight.detach().square().sum(0).view(4, 8).sum(1).topk(2).indices.sort().values
    assert sparse.in_index.view(2, 8)[:, 0].tolist() == (best * 8).tolist()
    kept = sparse.in_index.long()
    assert torch.equal(sparse.weight[:, kept], dense.weight[:, kept])
    assert not sparse.values[2].any()
    given = SparseEmbedding(4, 16, _weight=torch.arange(64.0).view(4, 16), _freeze=True)
    assert given.in_index.tolist() == list(range(8, 16))
    assert not given.values.requires_grad
    assert SparseEmbedding(4, 16, dtype=torch.float16).values.dtype == torch.float16


def test_pack_says_what_pruning_cost():
    dense = nn.Embedding(ROWS, 32)
    keep = Keep(torch.arange(4, 20))
    sparse, packed = SparseEmbedding.pack(dense, prune=keep)
    size = dense.weight.detach().double().square()
    share = size[:, 4:20].sum() / size.sum()
    assert packed.energy_kept == pytest.approx(float(share))
    assert sparse.packed.energy_kept == 1.0
    assert sparse.values.shape == (ROWS, 16)
    whole = SparseEmbedding.from_dense(dense, prune=Keep())
    assert torch.equal(whole(tokens(4)), dense(tokens(4)))


def test_rows_of_zeros_are_kept():
    sparse, dense = make("padding")
    with torch.no_grad():
        dense.weight[10:40] = 0
    sparse = SparseEmbedding.from_dense(dense)
    assert sparse.values.shape == (ROWS, len(KEPT))
    sparse = SparseEmbedding.from_dense(dense, prune="magnitude")
    assert len(sparse.values) == ROWS
    with torch.no_grad():
        dense.weight.zero_()
    assert SparseEmbedding.from_dense(dense).values.shape == (ROWS, 8)


# Checkpoints


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_load_checkpoint(kind, assign):
    sparse, dense = make()
    assert set(sparse.state_dict()) == {"values", "in_index"}
    target = nn.Sequential(SparseEmbedding(ROWS, COLUMNS, dtype=torch.float64))
    state = (sparse if kind == "sparse" else dense).state_dict()
    result = target.load_state_dict({f"0.{key}": value for key, value in state.items()}, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(target(tokens(5)), dense(tokens(5)))
    assert target[0].values.requires_grad


def test_load_into_meta_module_with_assign():
    sparse, dense = make()
    for state in (sparse.state_dict(), dense.state_dict()):
        target = SparseEmbedding(ROWS, COLUMNS, device="meta", dtype=torch.float64)
        assert target.values.is_meta and target.in_index.is_meta
        assert "density=unknown" in repr(target)
        target.load_state_dict(state, assign=True)
        assert torch.equal(target(tokens(5)), dense(tokens(5)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["in_index"].fill_(3), "in_index must be ascending without repetition, got 3 before 3"),
        (lambda s: s["in_index"].add_(10), "in_index must hold channels from 0 to 18, got 28"),
        (lambda s: s.update(values=s["values"][:-1]), r"values must have shape \(50, 11\)"),
        (lambda s: s.update(out_index=torch.arange(50)), "an embedding keeps every row, got out_index"),
        (lambda s: s.pop("values"), "values must come with in_index"),
        (
            lambda s: s.update(weight=torch.ones(2, 2)) or s.pop("values"),
            r"weight must have shape \(50, 19\)",
        ),
        (
            lambda s: s.update(weight=torch.ones(ROWS, COLUMNS)) or s.pop("values"),
            "weight must fit format channel: .*must have a column that is all zero",
        ),
    ],
)
def test_corrupted_checkpoint_is_refused(damage, message):
    sparse, _ = make()
    before = sparse(tokens(5))
    state = {key: value.clone() for key, value in sparse.state_dict().items()}
    damage(state)
    with pytest.raises(RuntimeError, match=message):
        sparse.load_state_dict(state)
    assert torch.equal(sparse(tokens(5)), before)


def test_copies_and_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    sparse, _ = make()
    safetensors.save_file(sparse.state_dict(), tmp_path / "x.safetensors")
    target = SparseEmbedding(ROWS, COLUMNS, dtype=torch.float64)
    target.load_state_dict(safetensors.load_file(tmp_path / "x.safetensors"))
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), target):
        assert torch.equal(twin(tokens(5)), sparse(tokens(5)))
        with torch.no_grad():
            twin.values.zero_()
        assert sparse.values.any()


# Casts and compilers


def test_casts_keep_the_list():
    sparse, dense = make()
    for cast in (lambda m: m.half(), lambda m: m.double(), lambda m: m.type(torch.float32)):
        cast(sparse)
        assert sparse.in_index.dtype == torch.int32
        assert sparse.in_index.tolist() == KEPT
        assert sparse(tokens(3)).dtype == sparse.values.dtype
    torch.testing.assert_close(sparse(tokens(3)).double(), dense(tokens(3)), rtol=1e-3, atol=1e-3)


def test_compile_and_export():
    torch._dynamo.reset()
    sparse, dense = make("padding")
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens(5)), dense(tokens(5)))
    compiled(tokens(5)).sum().backward()
    assert sparse.values.grad.any()
    length = torch.export.Dim("length", min=1, max=64)
    program = torch.export.export(sparse, (tokens(5),), dynamic_shapes=({0: length},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(tokens(9)), dense(tokens(9)))


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, r"SparseEmbedding: weight must have a column that is all zero .* shape \(50, 16\)"),
        (
            {"format": "nm24", "prune": "magnitude"},
            ValueError,
            "format must be channel, got 'nm24'",
        ),
        ({"prune": "l1"}, ValueError, r'prune must be None, "magnitude" or a Keep, got .l1.'),
        ({"prune": Keep(outputs=torch.arange(3))}, ValueError, r"prune must keep every row \(outputs=None\)"),
        ({"prune": Keep(nm24=True)}, ValueError, "prune must keep every row .* and not ask for 2:4"),
        (
            {"prune": Keep(torch.tensor([16]))},
            ValueError,
            "prune must hold channels from 0 to 15, got 16",
        ),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        SparseEmbedding.from_dense(nn.Embedding(ROWS, 16), **options)


def test_wrong_layer_is_refused():
    with pytest.raises(TypeError, match=r"SparseEmbedding.from_dense: layer must be Embedding, got Emb"):
        SparseEmbedding.from_dense(nn.EmbeddingBag(8, 8))
