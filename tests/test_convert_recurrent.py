"""``convert`` of recurrent layers and embeddings: hidden units and columns are their channels."""

import copy
import warnings

import pytest
import torch
from conftest import assert_untouched, state
from torch import nn

import sparseops
from sparseops import Channels, _measure
from sparseops.nn import SparseGRU
from sparseops.report import Code


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.lstm = nn.LSTM(32, 64, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(128, 40)
        self.head = nn.Linear(40, 8)

    def forward(self, tokens, state=None):
        y, (h, c) = self.lstm(self.embed(tokens), state)
        return self.head(self.gru(y)[0]), h + 1, c + 1


@pytest.fixture
def text():
    torch.manual_seed(2)
    return Text().eval()


TOKENS = torch.arange(14).view(2, 7) * 3


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("pattern", [Channels(0.5), Channels(0.5, side="both", then="2:4"), "2:4"], ids=str)
def test_recurrent_layers_and_embeddings(text, pattern, inplace, always_faster):
    given = copy.deepcopy(text)
    hx = (torch.randn(4, 2, 64), torch.randn(4, 2, 64))
    sparse = sparseops.convert(given, pattern, example_inputs=(TOKENS, hx), inplace=inplace)
    assert (sparse is given) == inplace
    masked = sparseops.to_dense(sparse)
    assert type(masked.lstm) is nn.LSTM
    for args in ((TOKENS,), (TOKENS, hx)):
        for ours, theirs in zip(sparse(*args), masked(*args), strict=True):
            torch.testing.assert_close(ours, theirs)
    report = sparseops.explain(sparse)
    assert report["lstm"].code is report["gru"].code is Code.CONVERTED
    assert report["lstm"].speedup == 2.0
    nbytes = sum(p.nbytes for p in text.lstm.parameters() if p.dim() > 1)
    assert report["lstm"].bytes_before == sparseops.explain(text)["lstm"].bytes_before == nbytes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = sparseops.explain(sparseops.convert(sparse, include="lstm"))
    assert again["lstm"].code is Code.ALREADY_SPARSE
    assert again["lstm"].bytes_before == report["lstm"].bytes_before
    assert again["lstm"].energy_kept == report["lstm"].energy_kept


def test_recurrent_layer_is_timed_as_it_is_called(text, monkeypatch):
    results = []

    def run_both(dense, sparse, device):
        results.append((dense(), sparse()))
        return 2.0, 1.0

    monkeypatch.setattr(_measure, "_alternate", run_both)
    hx = (torch.randn(4, 2, 64), torch.randn(4, 2, 64))
    sparse = sparseops.convert(text, Channels(0.5), include="lstm", example_inputs=(TOKENS, hx))
    for model, result in zip((text, sparse), results[0], strict=True):
        torch.testing.assert_close(result, model.lstm(text.embed(TOKENS), hx))


def test_nothing_of_the_dense_recurrent_layer_stays(text):
    sparse = sparseops.convert(text)
    assert not [name for name in vars(sparse.lstm) if "flat_weight" in name or "all_weights" in name]
    back = sparseops.to_dense(sparse)
    assert [id(p) for p in back.lstm._flat_weights] == [id(p) for p in back.lstm.parameters()]


def unit_scores(lstm, suffix, gates=4):
    w_ih, w_hh = (getattr(lstm, f"weight_{m}_{suffix}").detach().double() for m in ("ih", "hh"))
    hidden = w_hh.shape[1]
    rows = [w.view(gates, hidden, -1).square().sum((0, 2)) for w in (w_ih, w_hh)]
    return rows[0] + rows[1] + w_hh.square().sum(0)


def test_hidden_units_go_as_a_whole_in_every_gate(text):
    sparse = sparseops.convert(text, Channels(0.5))
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        by_block = unit_scores(text.lstm, suffix).view(8, 8).sum(1)
        best = by_block.topk(4).indices.sort().values
        expected = [8 * int(block) + unit for block in best for unit in range(8)]
        w_ih, w_hh = (sparse.lstm.weights[f"weight_{m}_{suffix}"] for m in ("ih", "hh"))
        for w in (w_ih, w_hh):
            by_gate = w.view(4, 64, -1).any(2)
            assert all(gate.nonzero().flatten().tolist() == expected for gate in by_gate)
        assert w_hh.any(0).nonzero().flatten().tolist() == expected
        assert w_ih.any(0).all()
    reason = sparseops.explain(sparse)["lstm"].reason
    assert reason.startswith("keeps ")
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        assert f"32 of 64 hidden units of {suffix}" in reason
    assert "24 of 40 hidden units of l0" in sparseops.explain(sparse)["gru"].reason


def test_columns_of_an_embedding(text):
    sparse = sparseops.convert(text, Channels(0.5))
    weight = text.embed.weight.detach()
    best = weight.square().sum(0).view(4, 8).sum(1).topk(2).indices
    expected = torch.zeros(4, 8).index_fill_(0, best, 1.0).flatten()
    assert torch.equal(sparse.embed.weight, weight * expected)
    assert sparseops.explain(sparse)["embed"].reason.startswith("keeps 16 of 32 columns in blocks of ")


def test_side_inputs_of_recurrent_layers_and_embeddings(text):
    sparse = sparseops.convert(text, Channels(0.5, side="inputs"))
    report = sparseops.explain(sparse)
    assert (report["embed"].code, report["embed"].reason) == (Code.WHOLE, "there are no inputs to drop")
    assert "16 of 32 inputs of l0" in report["lstm"].reason
    assert "all 64 hidden units of l0" in report["lstm"].reason
    w = sparse.lstm.weights["weight_ih_l0"]
    best = text.lstm.weight_ih_l0.square().sum(0).view(4, 8).sum(1).topk(2).indices.sort().values
    assert w.any(0).nonzero().flatten().tolist() == [8 * int(b) + i for b in best for i in range(8)]


def test_recurrent_last_layer_keeps_its_units(always_faster):
    model = nn.Sequential(nn.Linear(32, 32), nn.LSTM(32, 64, 2))
    sparse = sparseops.convert(model, Channels(0.5))
    assert type(sparse[1]) is nn.LSTM
    assert sparseops.explain(sparse)["1"].code is Code.WHOLE
    sparse = sparseops.convert(model.eval(), Channels(0.5), example_inputs=torch.randn(5, 2, 32))
    assert type(sparse[1]) is nn.LSTM


def test_then_24_of_an_embedding_is_left_out(text):
    report = sparseops.explain(sparseops.convert(text, Channels(0.5, side="both", then="2:4")))
    assert report["embed"].reason.endswith("2:4 is left out, since an embedding does not multiply")
    assert "what is kept is 2:4" in report["lstm"].reason
    assert report["gru"].reason.endswith(
        "2:4 is left out: input_size and hidden_size must be at least 32, got 64 and 24"
    )


def test_recurrent_zero_units_are_taken_as_they_are(text):
    rule = Channels(0.5, side="both", keep_last=False)
    masked = sparseops.to_dense(sparseops.convert(text, rule, exclude="head"))
    sparse = sparseops.convert(masked, rule, prune=None, exclude="head")
    for name, w in sparse.lstm.weights.items():
        assert torch.equal(w, getattr(masked.lstm, name))
    reason = sparseops.explain(sparse)["lstm"].reason
    assert "32 of 64 hidden units of l1_reverse" in reason
    assert reason.endswith("the others were zero already")
    with pytest.raises(ValueError, match=r"convert: weight of layer 'embed' must have zero channels: "):
        sparseops.convert(text, rule, prune=None)


@pytest.mark.parametrize("inplace", [False, True])
def test_wrong_recurrent_result_is_noticed(text, inplace, always_faster, monkeypatch):
    before = state(text)
    forward = SparseGRU.forward
    monkeypatch.setattr(
        SparseGRU, "forward", lambda self, *args: (forward(self, *args)[0] + 0.1, forward(self, *args)[1])
    )
    with pytest.raises(RuntimeError, match=r"convert: output 0 of layer 'gru' must equal"):
        sparseops.convert(text, Channels(0.5), example_inputs=TOKENS, inplace=inplace)
    assert_untouched(text, before)


def test_packed_sequences_are_measured(always_faster):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(32, 32)
            self.head = nn.Linear(32, 8)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
            return self.head(self.lstm(packed)[0].data)

    report = sparseops.explain(
        sparseops.convert(Packed().eval(), Channels(0.5), example_inputs=torch.randn(5, 2, 32))
    )
    assert report["lstm"].speedup == 2.0
