"""``Channels(together=True)``: layers whose outputs meet lose the same channels."""

import pytest
import torch
import torch.nn.functional as F
from pruned import assert_same
from torch import nn

from benchmarks.networks import NETWORKS
from sparseops import Channels, Plan, compact, convert, explain, explain_compact

TOGETHER = Channels(ratio=0.5, together=True)


class Block(nn.Module):
    """A stem, a residual block behind batch norm, and a head. gate: what the block's end is multiplied by."""

    def __init__(self, gated=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.inner = nn.Conv2d(32, 48, 3, padding=1)
        self.end = nn.Conv2d(48, 32, 3, padding=1)
        self.gate = nn.Conv2d(32, 32, 1) if gated else None
        self.head = nn.Conv2d(32, 8, 1)
        nn.init.normal_(self.norm.bias)
        with torch.no_grad():  # alone each would keep another half
            self.stem.weight[:16] *= 2
            self.end.weight[16:] *= 2

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = self.end(F.relu(self.inner(x)))
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(F.relu(x + y))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(2)


def made(pattern, model=None, **options):
    model = Block(**options).eval() if model is None else model
    x = torch.randn(2, 3, 10, 10)
    return model, x, convert(model, pattern, example_inputs=x, measure=False)


def kept(layer):
    return layer.out_index.tolist()


def test_layers_that_meet_keep_the_same_channels():
    model, x, sparse = made(TOGETHER)
    assert kept(sparse.stem) == kept(sparse.end) and len(kept(sparse.stem)) == 16
    _, _, apart = made(Channels(ratio=0.5), model)
    assert kept(apart.stem) == [*range(16)] and kept(apart.end) == [*range(16, 32)]
    assert kept(apart.inner) == kept(sparse.inner)  # meets no other
    small = compact(sparse, x)
    assert small.stem.weight.shape[0] == small.head.weight.shape[1] == 16
    assert all(edge.code.value in ("compacted", "whole") for edge in explain_compact(small).edges)
    assert_same(compact(sparse.double(), x.double()), sparse.double(), x.double())


def test_scores_are_added_each_over_its_mean():
    model = Block().eval()
    with torch.no_grad():
        for layer, scale in ((model.stem, 1.0), (model.end, 1000.0)):
            layer.weight.fill_(scale)
        model.stem.weight[:8] *= 0.1  # the stem would lose the first block, the end any other one
        model.stem.weight[8:16] *= 0.5
        model.end.weight[8:16] *= 0.4
        model.end.weight[16:24] *= 0.9
    _, _, sparse = made(Channels(ratio=0.25, together=True), model)
    mean = {"stem": (0.1 + 0.5 + 1 + 1) / 4, "end": (1 + 0.4 + 0.9 + 1) / 4}
    both = [0.1 / mean["stem"] + 1 / mean["end"], 0.5 / mean["stem"] + 0.4 / mean["end"]]
    assert both[1] < both[0]
    assert kept(sparse.stem) == kept(sparse.end) == [*range(8), *range(16, 32)]


def test_rows_say_who_chose():
    _, _, sparse = made(TOGETHER, gated=True)
    rows = explain(sparse)
    words = "outputs: chosen together with those of {} and 1 more, which they meet"
    assert words.format("end") in rows["stem"].reason and words.format("stem") in rows["gate"].reason
    assert "together" not in rows["inner"].reason
    assert kept(sparse.stem) == kept(sparse.end) == kept(sparse.gate)


def test_channels_that_have_to_stay_tie_nothing():
    """What a layer norm reads cannot be left out anywhere."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 8)
            self.norm = nn.LayerNorm(64)

        def forward(self, x):
            return self.head(self.norm(self.first(x) + self.second(x)))

    model, x = Normed().eval(), torch.randn(3, 16)
    sparse = convert(model, TOGETHER, example_inputs=x, measure=False)
    assert kept(sparse.first) != kept(sparse.second)
    assert all("together" not in row.reason for row in explain(sparse))


def test_each_pattern_of_a_plan_counts_for_itself():
    plan = Plan({"stem": TOGETHER, "end": Channels(ratio=0.25), "gate": Channels(ratio=0.25), "*": None})
    model = Block(gated=True).eval()
    with torch.no_grad():
        model.gate.weight[:16] *= 2
    _, _, sparse = made(plan, model)
    assert len(kept(sparse.stem)) == 16 and len(kept(sparse.end)) == 24
    assert all("together" not in row.reason for row in explain(sparse))
    assert kept(sparse.gate) != kept(sparse.end)


def test_inputs_are_chosen_alone():
    model = Block(gated=True).eval()
    model.inner, model.end = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
    with torch.no_grad():
        model.gate.weight[:, :16] *= 2
        model.end.weight[:, 16:] *= 2
    _, _, sparse = made(Channels(ratio=0.5, side="both", together=True), model)
    assert kept(sparse.stem) == kept(sparse.end) == kept(sparse.gate)
    assert sparse.gate.in_index.tolist() == [*range(16)] and sparse.end.in_index.tolist() == [*range(16, 32)]


def test_all_layers_compete_with_their_channels_counted_in_each():
    model = Block().eval()
    with torch.no_grad():
        for layer in (model.stem, model.inner, model.end):
            layer.weight.fill_(1.0)
        model.inner.weight[:8] *= 0.5
        model.stem.weight[:8] *= 0.7
        model.end.weight[:8] *= 0.7
    # A quarter of 32 + 48 + 32 is 28: a block of the inner layer, and one of the two that meet.
    _, _, sparse = made(Channels(ratio=0.25, scope="global", together=True), model)
    assert kept(sparse.stem) == kept(sparse.end) == [*range(8, 32)]
    assert kept(sparse.inner) == [*range(8, 48)]
    # A sixth is 18: the block of the two does not fit beside the inner one's, which matters less than each.
    _, _, sparse = made(Channels(ratio=1 / 6, scope="global", together=True), model)
    assert kept(sparse.inner) == [*range(8, 40)] and isinstance(sparse.stem, nn.Conv2d)


@pytest.mark.parametrize(("name", "edges"), [("resnet18", 18), ("resnet50", 23)])
def test_residual_networks_compact_everywhere(name, edges):
    net = NETWORKS[name]
    model, x = net.small(), net.small_example(2)
    sparse = convert(model, TOGETHER, example_inputs=x, measure=False)
    small = compact(sparse, x)
    codes = [edge.code.value for edge in explain_compact(small).edges]
    assert codes.count("compacted") == edges and codes.count("whole") == 1 and len(codes) == edges + 1
    assert_same(small, sparse, x)


def test_it_takes_example_inputs():
    with pytest.raises(
        ValueError, match=r"^convert: example_inputs must be given with Channels\(together=True\)"
    ):
        convert(Block(), TOGETHER)


def test_a_graph_that_cannot_be_drawn_is_refused():
    class Branching(Block):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    model = Branching().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match="^convert: pattern must be without together for a model whose graph"
    ):
        convert(model, TOGETHER, example_inputs=torch.randn(1, 3, 8, 8), inplace=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
