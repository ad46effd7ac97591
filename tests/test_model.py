"""The forward: stored logits, a plain twin over many configurations, causality to the bit."""

from __future__ import annotations

import plain_model
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import arrays, final_state, tiny_model
from torch import Tensor

from golf_ray.config import ModelConfig
from golf_ray.errors import ConfigError
from golf_ray.model.checkpoint import build_model
from golf_ray.model.compute import Compute
from golf_ray.model.layout import layer_order, layer_plan, looped_layers, num_skips
from golf_ray.model.model import GolfModel
from golf_ray.model.parameters import (
    bank,
    initial_state,
    matrix_specs,
    tensor_specs,
    unbank,
    unbanked_shapes,
)
from golf_ray.model.segments import Segments, TailRows
from golf_ray.presets import LAPTOP, RECORD, TINY

SMALL = {
    "vocab_size": 40,
    "embedding_dim": 16,
    "model_dim": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_mult": 2.0,
    "rope_dims": 2,
}


LAST_ROWS = TailRows(
    places_S=torch.arange(40, 64),
    cu_seqlens=torch.tensor([0, 24], dtype=torch.int32),
    max_seqlen=24,
)


def random_model(config: ModelConfig, seed: int = 0) -> GolfModel:
    """A model in which no tensor is at its neutral value."""
    model = GolfModel(config).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model.requires_grad_(False)


def run(model: GolfModel, tokens: Tensor, segments: Segments, loop: bool) -> Tensor:
    return model.logits(model.hidden(tokens, segments, loop=loop))


@pytest.mark.parametrize("tail", [None, LAST_ROWS], ids=["all rows", "their tail"])
def test_gains_keep_their_digits_in_16_bits(tail: TailRows | None) -> None:
    last = f"blocks.{TINY.model.num_layers - 1}.attn.q_gain"
    tokens = torch.from_numpy(arrays("forward")["tokens"][:64])

    def hidden(gain: float) -> Tensor:
        state = final_state() | {last: torch.full((TINY.model.num_heads,), gain)}
        model = build_model(TINY.model, state, compute=Compute(dtype=torch.bfloat16))
        return model.hidden(tokens, Segments.rows(1, 64), loop=False, tail=tail)

    # Both gains are the same number in bfloat16.
    assert not torch.equal(hidden(5.24), hidden(5.26))


@pytest.mark.parametrize("loop", [0, 1])
def test_logits_are_the_stored_ones(loop: int) -> None:
    stored = arrays("forward")
    tokens = torch.from_numpy(stored["tokens"])
    segments = Segments.of_bounds(stored["cu_seqlens"], 64)
    model = tiny_model()
    packed = run(model, tokens, segments, bool(loop))
    dense = run(model, tokens[:64], Segments.rows(1, 64), bool(loop))
    for found, name in ((packed, "varlen"), (dense, "dense")):
        expected = torch.from_numpy(stored[f"logits_{name}_loop{loop}"])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


configurations = st.builds(
    ModelConfig,
    **{name: st.just(value) for name, value in SMALL.items() if name != "embedding_dim"},
    embedding_dim=st.sampled_from([16, 8]),
    num_layers=st.integers(2, 5),
    tie_embeddings=st.booleans(),
    skip_gates=st.booleans(),
    ln_scale=st.booleans(),
    num_loops=st.integers(0, 2),
    loop_start=st.just(1),
    loop_end=st.just(1),
    parallel_start_layer=st.sampled_from([None, 0, 1, 2, 9]),
    parallel_final_lane=st.sampled_from(["mean", "attention", "mlp"]),
    xsa_last_n=st.integers(0, 2),
)


@settings(max_examples=60, deadline=None)
@given(configurations, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans())
def test_the_forward_agrees_with_a_plain_twin(
    config: ModelConfig, lengths: list[int], loop: bool
) -> None:
    model = random_model(config)
    weights = dict(model.state_dict())
    tokens = torch.randint(0, 40, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    # Positions of the whole buffer: rotary positions are relative inside a document.
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    found = run(model, tokens, Segments.of_bounds(bounds, max(lengths)), loop)
    expected = [plain_model.logits(t, weights, config, loop) for t in tokens.split(lengths)]
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-4, rtol=2e-4)


def test_a_buffer_much_longer_than_the_stored_ones() -> None:
    model = tiny_model()
    tokens = torch.randint(0, 512, (3000,), generator=torch.Generator().manual_seed(3))
    found = run(model, tokens, Segments.of_bounds([0, 1100, 3000], 1900), True)
    expected = plain_model.logits(tokens[1100:], final_state(), TINY.model, True)
    torch.testing.assert_close(found[1100:], expected, atol=2e-3, rtol=0)


def test_later_tokens_never_touch_earlier_bits() -> None:
    model = tiny_model()
    tokens = torch.randint(2, 512, (160,), generator=torch.Generator().manual_seed(5))
    segments = Segments.of_bounds([0, 60, 160], 100)
    before = run(model, tokens, segments, True)
    for place in (1, 30, 59, 61, 100, 159):
        changed = tokens.clone()
        changed[place:] = torch.randint(2, 512, (160 - place,))
        after = run(model, changed, segments, True)
        assert torch.equal(after[:place], before[:place])
        assert not torch.equal(after[place:], before[place:])
    changed = tokens.clone()
    changed[:60] = 7
    assert torch.equal(run(model, changed, segments, True)[60:], before[60:])


def test_the_records_layers_and_parameters() -> None:
    config = RECORD.model
    assert layer_order(config, False) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    encoder, decoder = layer_order(config, True)
    assert encoder == [0, 1, 2, 3, 4, 5, 3, 4]
    assert decoder == [5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert num_skips(config) == 8 and looped_layers(config) == {3, 4, 5}
    plan = layer_plan(config, True)
    assert [p.layer for p in plan if p.lanes] == [8, 9, 10]
    assert [p.layer for p in plan if p.splits] == [8]
    assert [p.skip for p in plan[8:]] == [0, 1, 2, 3, 4, 5, 6, 7, None]
    assert [p.skip for p in layer_plan(config, False)[5:]] == [0, 1, 2, 3, 4, None]
    counts = [torch.Size(s.shape).numel() for s in tensor_specs(config)]
    assert sum(counts) == 35_944_602


def test_names_shapes_and_order_are_the_public_ones() -> None:
    state = final_state()
    specs = tensor_specs(TINY.model)
    assert [(s.name, torch.Size(s.shape)) for s in specs] == [
        (n, t.shape) for n, t in state.items()
    ]
    assert list(GolfModel(TINY.model).state_dict()) == list(state)


@pytest.mark.parametrize("config", [TINY.model, LAPTOP.model])
def test_banks_taken_apart_go_together_again(config: ModelConfig) -> None:
    state = initial_state(config, 3)
    unbanked = unbank(config, state)
    assert {n: tuple(t.shape) for n, t in unbanked.items()} == unbanked_shapes(config)
    assert {m.name for m in matrix_specs(config)} <= set(unbanked)
    again = bank(config, unbanked)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    a, b, other = (initial_state(TINY.model, seed) for seed in (7, 7, 8))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["qo_bank"], other["qo_bank"])
    L = TINY.model.num_layers
    identity = torch.eye(64).expand(L, 64, 64)
    torch.testing.assert_close(a["qo_bank"][:L] @ a["qo_bank"][:L].mT, identity, atol=1e-5, rtol=0)
    assert not a["qo_bank"][L:].any() and not a["mlp_down_bank"].any()
    assert a["tok_emb.weight"].std().item() == pytest.approx(0.005, rel=0.02)
    stored = tensor_specs(TINY.model)
    for spec in stored:
        if spec.name.endswith(("scale", "gain", "lambdas", "gates", "skip_weights")):
            assert a[spec.name].unique().numel() == 1


def test_an_untrained_model_knows_nothing() -> None:
    # Output matrices are zero, so logits come from the token alone and the loss is that of chance.
    model = GolfModel(TINY.model).init_weights(0).requires_grad_(False)
    tokens = torch.arange(2, 500)
    loss = model.mean_loss(tokens, tokens.flip(0), Segments.rows(1, 498), loop=True)
    assert loss.item() == pytest.approx(torch.log(torch.tensor(512.0)).item(), abs=0.05)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smeer", "unknown part 'smeer'"),
        ("no_such_module:PART", "module 'no_such_module' is not found"),
        ("/no/such/file.py:PART", "there is no file /no/such/file.py"),
        ("json:dumps", "'json:dumps' in model.parts is no Part"),
    ],
)
def test_a_part_that_is_none_is_one_line(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GolfModel(ModelConfig(parts=(name,)))
