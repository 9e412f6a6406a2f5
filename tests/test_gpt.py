"""GPT: published names, parameter and FLOP counts, initialisation, and parity with transformers' GPT-2."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from llmforge import GPT, ConfigError, GPTConfig
from llmforge.nn import KVCache, LayerNorm, causal_attention

TOY = GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=3, n_embd=24)

# nanoGPT's names, written out from its model.py.
NANOGPT_KEYS = (
    ["transformer.wte.weight", "transformer.wpe.weight"]
    + [
        f"transformer.h.{layer}.{name}.{kind}"
        for layer in range(2)
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    ]
    + ["transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"]
)


def test_state_dict_has_nanogpts_keys():
    assert list(GPT(TOY).state_dict()) == NANOGPT_KEYS
    without_bias = GPT(TOY.replace(bias=False))
    assert list(without_bias.state_dict()) == [key for key in NANOGPT_KEYS if not key.endswith("bias")]


@pytest.mark.parametrize(
    ("preset", "params"),  # transformers' GPT2LMHeadModel(...).num_parameters(), counted on the meta device below
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_gpt2_presets_have_gpt2s_parameters(preset, params):
    config = GPTConfig.preset(preset)
    with torch.device("meta"):
        ours = GPT(config)
        theirs = GPT2LMHeadModel(GPT2Config(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd))
    assert ours.num_params() == params == theirs.num_parameters()


def test_char_gpt_preset_is_nanogpts_shakespeare_char():
    config = GPTConfig.preset("char-gpt", vocab_size=65)
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size, config.dropout) == (6, 6, 384, 256, 0.2)
    with torch.device("meta"):
        model = GPT(config)
    # nanoGPT prints 10.65M without position embeddings.
    assert model.num_params() - config.block_size * config.n_embd == 10_646_784


def test_docstring_parameter_formula():
    V, C, L, T = TOY.vocab_size, TOY.n_embd, TOY.n_layer, TOY.block_size
    assert GPT(TOY).num_params() == V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    assert GPT(TOY.replace(tie_word_embeddings=False)).num_params() == GPT(TOY).num_params() + V * C


def test_flops_per_token_are_what_torch_counts():
    model, T = GPT(TOY), 16
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, T, dtype=torch.long)).sum().backward()
    assert counter.get_total_flops() == model.flops_per_token(T) * 2 * T
    assert model.flops_per_token() == model.flops_per_token(16) != model.flops_per_token(8)


def hugging_face_twin(model: GPT) -> GPT2LMHeadModel:
    config = model.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function=config.activation_function,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    ).eval()
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    state = {k: v.t() if k.endswith(conv1d) else v for k, v in model.state_dict().items()}
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_match_transformers(activation, tied):
    model = GPT(TOY.replace(activation_function=activation, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for p in model.parameters():  # random biases and gains too: zeros and ones would hide a mix-up
            p.add_(torch.randn_like(p) * 0.1)
    idx = torch.randint(0, 61, (2, 16))
    theirs = hugging_face_twin(model)
    with torch.no_grad():
        torch.testing.assert_close(model(idx), theirs(idx).logits, atol=2e-5, rtol=1e-5)  # order of float sums
        model.transformer.h[1].mlp.c_fc.bias[0] += 0.1  # negative control
        assert (model(idx) - theirs(idx).logits).abs().max() > 1e-3


def test_initialisation_is_gpt2s():
    model = GPT(GPTConfig(vocab_size=1000, block_size=64, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "ln_" in name:
            assert bool((p == 1).all())
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # 4 = sqrt(2 * n_layer)
            assert p.std().item() == pytest.approx(expected, rel=0.05)


def test_tied_head_shares_its_weight_and_an_untied_one_does_not():
    tied, untied = GPT(TOY), GPT(TOY.replace(tie_word_embeddings=False))
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.lm_head.weight is not untied.transformer.wte.weight


def test_forward_is_the_projection_of_the_features():
    model, idx = GPT(TOY).eval(), torch.randint(0, 61, (2, 7))
    assert model.features(idx).shape == (2, 7, 24)
    assert torch.equal(model(idx), model.lm_head(model.features(idx)))


def test_a_token_does_not_see_the_future():
    model, idx = GPT(TOY).eval(), torch.randint(0, 61, (1, 16))
    changed = idx.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 61
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize("pieces", [[16], [1] * 16, [5, 1, 10], [15, 1]])
def test_reading_through_a_cache_in_pieces_gives_the_same_features(pieces):
    model, idx = GPT(TOY).eval(), torch.randint(0, 61, (2, 16))
    cache, parts = KVCache(16), []
    for piece in idx.split(pieces, dim=1):
        parts.append(model.features(piece, cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), model.features(idx), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"17 tokens do not fit in block_size \(16\)"):
        model.features(idx[:, :1], cache)


def test_kv_cache_refuses_more_than_it_holds():
    cache = KVCache(4)
    with pytest.raises(ValueError, match="holds 4 tokens, 5 are needed"):
        cache.update(0, torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2))


def test_causal_attention_by_hand():
    # One head, width 1, q.k = 0 everywhere: each position averages the values up to its own.
    zeros, v = torch.zeros(1, 1, 3, 1), torch.tensor([3.0, 5.0, 10.0]).view(1, 1, 3, 1)
    assert causal_attention(zeros, zeros, v).flatten().tolist() == pytest.approx([3.0, 4.0, 6.0])
    assert causal_attention(zeros[:, :, 1:], zeros, v).flatten().tolist() == pytest.approx([4.0, 6.0])
    assert causal_attention(zeros[:, :, 2:], zeros, v).flatten().tolist() == pytest.approx([6.0])


def test_layer_norm_matches_torch():
    x, ours, theirs = torch.randn(3, 8), LayerNorm(8), torch.nn.LayerNorm(8)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(n_embd=25), r"n_embd \(25\) must be divisible by n_head \(3\); try n_embd=27"),
        (dict(n_layer=0), r"n_layer \(0\) must be at least 1"),
        (dict(vocab_size=0), r"vocab_size \(0\) must be at least 1"),
        (dict(dropout=1.0), r"dropout \(1.0\) must be at least 0 and below 1"),
        (
            dict(activation_function="swish"),
            "activation_function must be one of 'gelu_new', 'gelu', 'relu', got 'swish'",
        ),
    ],
)
def test_an_impossible_shape_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        TOY.replace(**change)


def test_dropout_is_active_in_training_only():
    model, idx = GPT(TOY.replace(dropout=0.5)), torch.randint(0, 61, (1, 16))
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))
