"""Recurrent layers and their inputs for tests: dense ones with zeros in them, and their sparse forms."""

from dataclasses import replace

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from sparseops.formats import NM24, Keep
from sparseops.nn import SparseGRU, SparseLSTM

FEATURES, HIDDEN = 19, 24
CELLS = {"lstm": SparseLSTM, "gru": SparseGRU}
FORMATS = ("nm24", "channel", "channel_nm24")
LAYERS = {
    "one": {},
    "two_layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "deep": {"num_layers": 3, "bidirectional": True, "batch_first": True},
}
KINDS = ("batched", "unbatched", "packed", "packed_in_order", "one_step")


def suffixes(layer):
    ends = ("", "_reverse") if layer.bidirectional else ("",)
    return [f"l{k}{end}" for k in range(layer.num_layers) for end in ends]


def weight_names(layer):
    return [f"weight_{matrix}_{suffix}" for suffix in suffixes(layer) for matrix in ("ih", "hh")]


def some(total, kept, seed):
    """``kept`` of ``total`` numbers, ascending."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:kept].sort().values


def keeps_of(layer, nm24=False):
    """Lists that differ between layers and directions."""
    return {
        suffix: Keep(
            some(getattr(layer, f"weight_ih_{suffix}").shape[1], 9 + number, number),
            some(layer.hidden_size, 11 - number, 100 + number),
            nm24,
        )
        for number, suffix in enumerate(suffixes(layer))
    }


@torch.no_grad()
def drop(layer, keeps):
    """Put zeros where channels are not kept, with no help of the package."""
    hidden = layer.hidden_size
    for suffix, keep in keeps.items():
        w_ih, w_hh = (getattr(layer, f"weight_{matrix}_{suffix}") for matrix in ("ih", "hh"))
        for feature in set(range(w_ih.shape[1])) - set(keep.inputs.tolist()):
            w_ih[:, feature] = 0
        for unit in set(range(hidden)) - set(keep.outputs.tolist()):
            w_hh[:, unit] = 0
            w_ih[unit::hidden] = 0
            w_hh[unit::hidden] = 0


def make(cell, format, layers="one", dtype=torch.float64, **options):
    """A sparse layer, and the dense one with the same zeros."""
    torch.manual_seed(0)
    cls = CELLS[cell]
    dense = cls.dense_class(FEATURES, HIDDEN, dtype=dtype, **LAYERS[layers], **options)
    if format == "nm24":
        with torch.no_grad():
            for name in weight_names(dense):
                weight = getattr(dense, name)
                weight.copy_(NM24.from_dense(weight, prune="magnitude").to_dense())
        return cls.from_dense(dense), dense
    if format == "channel":
        drop(dense, keeps_of(dense))
        return cls.from_dense(dense, format="channel"), dense
    sparse = cls.from_dense(dense, prune=keeps_of(dense, nm24=True), format="channel")
    return sparse, sparse.to_dense()


def make_input(layer, kind, dtype=torch.float64):
    """An input, and a state for it."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    cells = len(suffixes(layer))
    if kind.startswith("packed"):
        lengths = (6, 3, 3, 1) if kind == "packed_in_order" else (3, 6, 1, 3)
        sequences = [draw(length, layer.input_size) for length in lengths]
        x, sizes = pack_sequence(sequences, enforce_sorted=kind == "packed_in_order"), (cells, 4)
    elif kind == "unbatched":
        x, sizes = draw(5, layer.input_size), (cells,)
    else:
        steps, batch = (1 if kind == "one_step" else 5), 3
        shape = (batch, steps) if layer.batch_first else (steps, batch)
        x, sizes = draw(*shape, layer.input_size), (cells, batch)
    h = draw(*sizes, layer.hidden_size)
    return x, (h, draw(*sizes, layer.hidden_size)) if isinstance(layer, (nn.LSTM, SparseLSTM)) else h


def flat(result):
    """The tensors of a layer's result: outputs, h, and of an LSTM c."""
    output, state = result
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(state if isinstance(state, tuple) else (state,))]


def assert_same(found, expected, bound=1e-12):
    for ours, theirs in zip(flat(found), flat(expected), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


def as_dense(held, values):
    """``values`` where a weight's own values lie in the dense weight."""
    return replace(held, values=values).to_dense()
