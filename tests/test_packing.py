"""Several documents in a row: each one as if it was alone, on every backend of attention."""

import copy
import functools
import itertools
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmforge.errors import ConfigError, DataError
from llmforge.models import GPT, BitNet, BitNetConfig, GPTConfig, Llama, LlamaConfig
from llmforge.nn import Documents, KVCache, attention_mask, causal_attention, document_backend, documents
from llmforge.training import next_token_loss
from llmforge.training.loss import chunked_next_token_loss

LLAMA = dict(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8)
LLAMA |= dict(num_key_value_heads=2, max_position_embeddings=64)
BITNET = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
# Every kind of attention that the families have.
MODELS = {
    "llama": lambda: Llama(LlamaConfig(**LLAMA)),
    "window": lambda: Llama(LlamaConfig(**LLAMA, sliding_window=5, max_window_layers=1)),
    "qwen3": lambda: Llama(LlamaConfig(**LLAMA, qk_norm=True)),
    "gpt": lambda: GPT(GPTConfig(vocab_size=99, block_size=64, n_layer=3, n_head=4, n_embd=32)),
    "bitnet": lambda: BitNet(BitNetConfig(**BITNET, sub_norm=True, act_quant="none", max_position_embeddings=64)),
}
LENGTHS = [[7, 1, 12, 4], [3, 21]]  # two rows of 24 tokens


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]().eval()


@pytest.fixture
def idx():
    return torch.randint(99, (2, 24))


def positions_of(lengths):
    return torch.tensor([[place for length in row for place in range(length)] for row in lengths])


POSITIONS = positions_of(LENGTHS)


def documents_of(idx, lengths=LENGTHS):
    return [part[None] for row, sizes in zip(idx, lengths, strict=True) for part in row.split(sizes)]


def backend_of(name):
    return nullcontext() if name == "cheapest" else document_backend(name)


@pytest.mark.parametrize("backend", ["mask", "loop", "cheapest"])
def test_every_token_is_as_if_its_document_was_alone(model, idx, backend):
    with torch.no_grad():
        alone = torch.cat([model(document)[0] for document in documents_of(idx)])
        with backend_of(backend):
            packed = model.lm_head(model.features(idx, positions=POSITIONS)).flatten(0, 1)
        together = model(idx).flatten(0, 1)
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=0)
    assert (together - alone)[7:].abs().max() > 0.1  # negative control: without positions the documents see each other
    torch.testing.assert_close(together[:7], alone[:7], atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["mask", "loop"])
def test_the_gradient_of_a_pack_is_the_sum_of_its_documents_gradients(model, idx, backend):
    targets = torch.randint(99, (2, 24))
    targets[0, 6] = targets[1, 5] = -100
    alone, neighbours = copy.deepcopy(model), copy.deepcopy(model)
    with document_backend(backend):
        loss_sum, num_targets = chunked_next_token_loss(model, (idx, targets, POSITIONS))
    loss_sum.backward()
    losses = [next_token_loss(alone, pair) for pair in zip(documents_of(idx), documents_of(targets), strict=True)]
    sum(loss for loss, _ in losses).backward()
    chunked_next_token_loss(neighbours, (idx, targets))[0].backward()
    assert num_targets == sum(n for _, n in losses) == 46
    torch.testing.assert_close(loss_sum, sum(loss for loss, _ in losses))
    for one, other, leaking in zip(model.parameters(), alone.parameters(), neighbours.parameters(), strict=True):
        scale = other.grad.abs().max()
        assert (one.grad - other.grad).abs().max() <= 1e-5 * scale
        assert (leaking.grad - other.grad).abs().max() > 1e-3 * scale  # negative control


@pytest.mark.parametrize("backend", ["mask", "loop"])
def test_a_neighbour_changes_nothing(model, idx, backend):
    changed = idx.clone()
    changed[0, :7] = (changed[0, :7] + 1) % 99  # the first document
    with torch.no_grad(), document_backend(backend):
        before, after = (model.features(x, positions=POSITIONS) for x in (idx, changed))
        leaking = (model.features(x) for x in (idx, changed))
        assert torch.equal(before[0, 7:], after[0, 7:])
        assert torch.equal(before[1], after[1])
        assert not torch.equal(before[0, :7], after[0, :7])
        assert not torch.equal(*(x[0, 7:] for x in leaking))


def test_a_row_of_one_document_is_what_it_is_without_positions(model, idx):
    with torch.no_grad():
        packed = model.lm_head(model.features(idx, positions=torch.arange(24).expand(2, -1)))
        torch.testing.assert_close(packed, model(idx), atol=1e-6, rtol=0)


def test_a_row_may_be_longer_than_the_context_of_its_documents(model):
    idx, lengths = torch.randint(99, (1, 96)), [[64, 32]]
    with torch.no_grad():
        packed = model.lm_head(model.features(idx, positions=positions_of(lengths)))[0]
        alone = torch.cat([model(document)[0] for document in documents_of(idx, lengths)])
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match=r"65 tokens of a document do not fit in \w+ \(64\)"):
        model.features(idx, positions=positions_of([[65, 31]]))


def test_dropout_drops_weights_in_packs_too():
    model = GPT(GPTConfig(vocab_size=9, block_size=8, n_layer=1, n_head=1, n_embd=8, dropout=0.5)).train()
    model.transformer.h[0].attn.resid_dropout.p = model.transformer.h[0].mlp.dropout.p = model.transformer.drop.p = 0.0
    idx, positions = torch.randint(9, (1, 8)), positions_of([[5, 3]])
    for backend in ("mask", "loop"):
        with document_backend(backend):
            assert not torch.equal(*(model.features(idx, positions=positions) for _ in range(2)))
            model.eval()
            assert torch.equal(*(model.features(idx, positions=positions) for _ in range(2)))
            model.train()


# --- Documents


@settings(max_examples=50)
@given(st.data(), st.integers(1, 12), st.integers(1, 3), st.none() | st.integers(1, 5))
def test_the_mask_is_what_a_loop_over_all_pairs_says(data, T, B, window):
    rows = []
    for _ in range(B):
        row = [0]
        while len(row) < T:
            row.append(0 if data.draw(st.booleans()) else row[-1] + 1)
        rows.append(row)
    documents = Documents(torch.tensor(rows)).windowed(window)
    mask = documents.mask()
    assert mask.shape == (B, 1, T, T)
    for row, places in enumerate(rows):
        for query in range(T):
            for key in range(T):
                begin = query - places[query]
                seen = begin <= key <= query and (window is None or query - key < window)
                assert mask[row, 0, query, key].item() == seen
    ends = [t for places in rows for t, following in zip(places, [*places[1:], 0], strict=True) if following == 0]
    assert documents.lengths == tuple(end + 1 for end in ends)


@pytest.mark.parametrize("window", [None, 2, 9])
def test_both_backends_are_softmax_over_the_document(window):
    q, k, v = torch.randn(2, 4, 24, 8), torch.randn(2, 2, 24, 8), torch.randn(2, 2, 24, 8)
    expected = torch.zeros_like(q)
    for row, sizes in enumerate(LENGTHS):
        begin = 0
        for size in sizes:
            for t in range(begin, begin + size):
                first = begin if window is None else max(begin, t + 1 - window)
                for head in range(4):
                    keys, values = k[row, head // 2, first : t + 1], v[row, head // 2, first : t + 1]
                    expected[row, head, t] = (keys @ q[row, head, t] / 8**0.5).softmax(0) @ values
            begin += size
    for backend in ("mask", "loop"):
        with document_backend(backend):
            documents = Documents(POSITIONS).windowed(window)
        found = causal_attention(q, k, v, mask=documents)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_layers_share_what_is_computed_of_the_documents(monkeypatch):
    calls = []
    cumsum = torch.Tensor.cumsum
    monkeypatch.setattr(
        torch.Tensor, "cumsum", lambda self, *args, **kwargs: calls.append(1) or cumsum(self, *args, **kwargs)
    )
    model = MODELS["llama"]()
    with document_backend("mask"):
        model.features(torch.randint(99, (2, 24)), positions=POSITIONS)
    assert len(calls) == 1


def test_the_cheapest_backend_is_the_one_with_fewer_pairs(monkeypatch):
    def taken(lengths):
        documents, backend = Documents(positions_of(lengths)), []
        monkeypatch.setattr(
            Documents, "mask", lambda self: backend.append("mask") or attention_mask(*[sum(lengths[0])] * 2)
        )
        q = torch.randn(len(lengths), 1, sum(lengths[0]), 4)
        causal_attention(q, q, q, mask=documents)
        return backend or ["none"]

    assert taken([[128] * 4]) == ["none"]  # 4 * (128^2 + 1000) pairs against 512^2
    assert taken([[64], [64]]) == ["none"]  # a row that is one document needs no mask
    assert taken([[2] * 16]) == ["mask"]  # 16 calls, each worth 1000 pairs, against 32^2
    assert taken([[300, 212]]) == ["none"]


@pytest.mark.parametrize(
    "rows", [[[0, 1, 3]], [[1, 2, 3]], [[0, 1, 1]], [[0, 1], [5, 6]], [[0, -1]], [0, 1, 2]], ids=str
)
def test_positions_that_do_not_count_up_are_refused(rows):
    with pytest.raises(DataError, match="must be \\(B, T\\) and count 0, 1, 2, .* got shape .* beginning"):
        Documents(torch.tensor(rows))


def test_what_does_not_go_together_is_refused(model, idx):
    with pytest.raises(ConfigError, match="pass kv_cache or positions"):
        model.features(idx, KVCache(24), positions=POSITIONS)
    with pytest.raises(DataError, match=r"positions have the shape \(2, 24\), but idx \(2, 23\)"):
        model.features(idx[:, 1:], positions=POSITIONS)
    with pytest.raises(ConfigError, match="'flash' must be 'varlen', 'mask' or 'loop'"), document_backend("flash"):
        pass
    with pytest.raises(ConfigError, match="varlen attention needs a CUDA device"), document_backend("varlen"):
        model.features(idx, positions=POSITIONS)


# --- varlen, which the CPU has not: its place is taken by a loop with the same arguments


def stand_in(q, k, v, cu_seqlens, longest, window, *, leaks=False):
    """(N, H, D) tokens laid end to end; `window` tokens to the left, -1 = all."""
    assert cu_seqlens.dtype == torch.int32
    edges = [0, len(q)] if leaks else cu_seqlens.tolist()
    assert longest == max(end - begin for begin, end in itertools.pairwise(cu_seqlens.tolist()))
    found = []
    for begin, end in itertools.pairwise(edges):
        part = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        mask = attention_mask(end - begin, end - begin, window=None if window < 0 else window + 1)
        found.append(causal_attention(*part, mask=mask)[0].transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("name", ["llama", "window", "gpt"])
def test_varlen_gets_what_it_needs(monkeypatch, idx, name):
    model, calls = MODELS[name]().eval(), []
    with torch.no_grad(), document_backend("loop"):
        expected = model.features(idx, positions=POSITIONS)
    monkeypatch.setattr(documents, "_has_varlen", lambda device, dtype, head_dim: True)
    monkeypatch.setattr(documents, "_varlen", lambda *args: calls.append(args[3]) or stand_in(*args))
    with torch.no_grad():
        found = model.features(idx, positions=POSITIONS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert len(calls) == 3
    assert calls[0] is calls[1] is calls[2]
    assert calls[0].tolist() == [0, 7, 8, 20, 24, 27, 48]


def test_varlen_is_tried_before_it_is_trusted(monkeypatch):
    def works(function):
        monkeypatch.setattr(documents, "_varlen", function)
        return documents._varlen_works(torch.device("cpu"), torch.bfloat16, 16)

    def missing(*args):
        raise ImportError("cannot import name 'varlen_attn'")

    def other_arguments(*args):
        raise TypeError("varlen_attn() got an unexpected keyword argument 'window_size'")

    assert works(stand_in)
    with torch.inference_mode():
        assert works(stand_in)
    assert not works(functools.partial(stand_in, leaks=True))
    assert not works(lambda *args: stand_in(*args[:-1], -1))  # no window
    assert not works(missing)
    assert not works(other_arguments)
    assert not documents._has_varlen(torch.device("cpu"), torch.bfloat16, 16)


def test_trying_varlen_within_a_checkpointed_block_leaves_no_trace(monkeypatch, idx):
    model = MODELS["llama"]().train()
    monkeypatch.setattr(documents, "_varlen", stand_in)
    tried = functools.cache(lambda *args: documents._varlen_works(*args) is None)  # tried at the first layer; False
    monkeypatch.setattr(documents, "_has_varlen", tried)
    model.set_activation_checkpointing("blocks")
    chunked_next_token_loss(model, (idx, idx, POSITIONS))[0].backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_activation_checkpointing("none")
    chunked_next_token_loss(model, (idx, idx, POSITIONS))[0].backward()
    assert all(torch.equal(one, p.grad) for one, p in zip(found, model.parameters(), strict=True))
    assert tried.cache_info().misses == 1
