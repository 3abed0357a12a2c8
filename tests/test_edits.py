"""Edits: each kind does what its name says, only where it says, and nonsense is refused."""

import pytest
import torch
from small_models import some_tokens, tiny
from torch import Tensor

from lmmono.errors import ModelError
from lmmono.models.hooks import Edit, editing, recording, run_with_cache, run_with_edit


def test_the_mid_stream_holds_together_when_the_block_input_is_edited_too():
    model, tokens = tiny("gpt2"), some_tokens(1, 5)
    noise = torch.randn(16, generator=torch.Generator().manual_seed(0))
    value = torch.randn(16, generator=torch.Generator().manual_seed(1))
    both = [Edit("blocks.0.hook_resid_pre", "add", direction=noise)]
    both += [Edit("blocks.0.hook_resid_mid", "set", value)]
    for edits in (both, both[::-1]):
        with editing(model, edits), recording(model, "blocks.0.*") as record:
            model(tokens)
        expected = value.expand(1, 5, 16)
        torch.testing.assert_close(record["blocks.0.hook_resid_mid"], expected)
        after = expected + record["blocks.0.hook_mlp_out"]
        torch.testing.assert_close(record["blocks.0.hook_resid_post"], after)


def test_each_kind_of_edit_does_what_its_name_says():
    model, tokens = tiny("gpt2"), some_tokens(2, 5)
    hook = "blocks.0.mlp.hook_post"
    _, acts = run_with_cache(model, tokens, hook)
    before = acts[hook]
    units, positions = [3, 60], [1, -1]
    direction = torch.arange(64.0)
    mean = before.mean((0, 1))

    def after(edit: Edit) -> Tensor:
        with editing(model, edit), recording(model, hook) as record:
            model(tokens)
        return record[hook].detach()

    def expect(edit: Edit, change, units=slice(None), positions=slice(None)) -> None:
        expected = before.clone()
        rows = torch.arange(5)[positions]
        columns = torch.arange(64)[units]
        place = (slice(None), rows[:, None], columns)
        expected[place] = change(expected[place])
        torch.testing.assert_close(after(edit), expected)

    expect(Edit(hook, "set", 2.5), lambda a: torch.full_like(a, 2.5))
    expect(Edit(hook, "scale", -3.0, units=units), lambda a: -3 * a, units)
    expect(Edit(hook, "ablate", positions=positions), torch.zeros_like, positions=positions)
    expect(
        Edit(hook, "ablate", mean, units, positions),
        lambda a: a * 0 + mean[units],
        units,
        positions,
    )
    expect(Edit(hook, "add", direction=direction), lambda a: a + direction)
    expect(Edit(hook, "add", 0.5, direction=direction), lambda a: a + 0.5 * direction)
    two = torch.tensor([7.0, 8.0])
    expect(Edit(hook, "set", two, units=units), lambda a: a * 0 + two, units)
    expect(Edit(hook, "add", units=units, direction=two), lambda a: a + two, units)
    expect(Edit(hook, "set", before * 2), lambda a: a * 2)


def test_edits_of_one_hook_follow_each_other_in_order():
    model, tokens, hook = tiny("crate"), some_tokens(1, 4), "blocks.1.mlp.hook_post"
    with editing(model, [Edit(hook, "set", 1.0), Edit(hook, "scale", 3.0)]):  # noqa: SIM117
        with recording(model, hook) as record:
            model(tokens)
    assert (record[hook] == 3.0).all()


def test_an_edited_head_is_a_slice_of_the_flattened_heads():
    model, tokens = tiny("gpt2"), some_tokens(1, 4)
    head = Edit("blocks.0.attn.hook_z", "ablate", units=range(4, 8))
    with editing(model, head), recording(model, "blocks.0.attn.hook_z") as record:
        model(tokens)
    z = record["blocks.0.attn.hook_z"]
    assert not z[:, :, 1].any()
    assert z[:, :, [0, 2, 3]].abs().min() > 0


def test_an_edit_that_makes_no_sense_is_refused_with_its_name():
    model, tokens = tiny("crate"), some_tokens(1, 4)
    hook = "blocks.0.mlp.hook_post"
    with pytest.raises(ModelError, match="want a value, got none"):
        Edit(hook, "scale")
    with pytest.raises(ModelError, match="want a direction with 'add'"):
        Edit(hook, "add", 1.0)
    with pytest.raises(ModelError, match="want a direction with 'add', and only there"):
        Edit(hook, "set", 1.0, direction=torch.zeros(64))
    for edit, match in [
        (Edit(hook, "ablate", units=[64]), r"units \[64\] outside 0\.\.63"),
        (Edit(hook, "ablate", positions=[-5]), r"positions \[-5\] outside 0\.\.3"),
        (Edit(hook, "set", torch.zeros(5)), r"shape \[5\], want a number or 64 of them"),
        (Edit("blocks.0.mlp.hook_pots", "ablate"), "did you mean blocks.0.mlp.hook_post"),
    ]:
        with pytest.raises(ModelError, match=match):
            run_with_edit(model, tokens, edit)
    torch.testing.assert_close(model(tokens).logits, tiny("crate")(tokens).logits)


def test_generation_runs_through_edits():
    model, tokens = tiny("crate"), some_tokens(1, 4)
    plain = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    before = model.generate(tokens, **plain)
    with editing(model, Edit("blocks.1.mlp.hook_post", "ablate")):
        silenced = model.generate(tokens, **plain)
    # nothing but the final bias is left to say, so one token over and over
    assert len(set(silenced[0, 4:].tolist())) == 1
    assert model.generate(tokens, **plain).equal(before)
