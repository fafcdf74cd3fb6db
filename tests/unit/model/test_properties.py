"""What the model promises, one test a promise, in float64, so that equality means equality.

property                              where it is held
1  causality                          here
2  prefixes                           here
3  the article's formula              test_attention.py
4  short contexts, gate without use   here (outputs: test_attention.py)
5  mix_local at run time              here
6  the gate's start and its learning  here
7  the selected set                   test_reference.py, by eye; test_attention.py
8  locality, bounds off by one        here
9  paged == parallel                  test_reference.py, test_attention.py
10 poison                             test_reference.py, test_attention.py
11 summaries                          here
13 a depth is a model of its own      here, bit for bit
16 router: causal, no gradient        here and test_depth.py; cache hits and chunks: tests/unit/engine
17 monotone knobs, budgets kept       test_depth.py
19 exit order, exit tax               tests/unit/evaluate/test_control.py; the figure itself: the quickstart's report
23 images and the cache               here (logits); units: tests/unit/engine
24 losses keep to their tokens        tests/unit/train/test_loss.py; shares: tests/unit/data/test_order.py
26 INT8                               tests/flows/test_int8_flow.py; kernels: test_int8.py; the figure: the quickstart's report
27 gradients                          test_attention.py; on a GPU: tests/gpu
28 configs                            test_net.py
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shoal import Model, presets
from shoal.inputs import media
from shoal.inputs.tokenizer import PATCH_ID
from shoal.model.attention import Layout, hybrid_attention
from shoal.model.block import rope_tables
from shoal.model.cache import GroupCache, PagedStep
from shoal.model.net import Net
from shoal.model.router import features, fit_router, page_sums
from shoal.train.loss import LossModel

F64 = torch.float64
TEST = presets.get("test").model
BLOCKS = [(1, 8), (2, 8), (4, 8), (8, 8)]  # S and P


def net_of(seed=0, **change):
    config = dataclasses.replace(TEST, **change)
    return Net(config).init_(seed).double().requires_grad_(False)


def text(count, seed=0):
    return torch.randint(9, 300, (1, count), generator=torch.Generator().manual_seed(seed))


def gates(net):
    return [block.attention for group in net.groups for block in group.blocks]


def picture(color, config=TEST):
    return media.to_patches(Image.new("RGB", (24, 12), color), config)


@pytest.mark.parametrize(("block", "page"), BLOCKS)
@pytest.mark.parametrize("summary", ["mean", "mean_var"])
def test_1_what_comes_later_changes_nothing_before_it(block, page, summary):
    """At every exit, cut at and around the ends of blocks and pages."""
    net = net_of(block=block, page=page, summary=summary)
    tokens = text(50)
    before = net(tokens, exits=net.config.exits)
    for t in sorted({0, block - 1, block, page - 1, page, 31, 48}):
        later = tokens.clone()
        later[:, t + 1 :] = 299 - later[:, t + 1 :] % 200
        after = net(later, exits=net.config.exits)
        for e in net.config.exits:
            assert (after[e][:, : t + 1] - before[e][:, : t + 1]).abs().max() < 1e-9
            assert not torch.allclose(after[e][:, t + 1 :], before[e][:, t + 1 :])


def test_1_a_later_patch_changes_nothing_before_it():
    model = Model.from_preset("test", dtype="float64")
    image = picture((200, 30, 30))
    ids = [50, *image.tokens(), 60]
    places = [at for at, token in enumerate(ids) if token == PATCH_ID]
    before = model.logits(ids, images=[image])
    for number, at in enumerate(places):
        values = image.values.copy()
        values[number:] = 255 - values[number:]
        after = model.logits(ids, images=[media.Patches(values, image.rows, image.cols)])
        assert (after[:at] - before[:at]).abs().max() < 1e-9
        assert not torch.allclose(after[at], before[at])


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(BLOCKS), st.integers(2, 90), st.data())
def test_2_a_prefix_is_a_prompt_of_its_own(shape, length, data):
    net = net_of(block=shape[0], page=shape[1])
    tokens, cut = text(length, length), data.draw(st.integers(1, length))
    whole, part = net(tokens, exits=(1, 4)), net(tokens[:, :cut], exits=(1, 4))
    for e in (1, 4):
        assert (whole[e][:, :cut] - part[e]).abs().max() < 1e-9


def test_4_where_both_branches_see_everything_the_gate_has_no_gradient():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 16, h, 8, generator=g, dtype=F64, requires_grad=True) for h in (4, 2, 2))
    gamma = torch.full((4,), 0.7, dtype=F64, requires_grad=True)
    gradients = []
    for share in (gamma, 0.1):
        out = hybrid_attention(q, k, v, window=16, block=4, top_k=4, sinks=1, local_weight=share)
        gradients.append(torch.autograd.grad(out.square().sum(), [q, k, v], retain_graph=True))
        if share is gamma:
            (slope,) = torch.autograd.grad(out.square().sum(), gamma)
    assert slope.abs().max() < 1e-12
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*gradients, strict=True))


def test_5_the_mix_can_be_set_at_run_time():
    """1 is the window alone, whatever the blocks; 0 the global branch alone, whatever the window; and back again."""
    net, tokens = net_of(), text(90)
    learned = net(tokens)[4]
    for share, other in ((1.0, {"top_k": 1, "block": 4}), (0.0, {"window": 3})):
        changed = net_of(**other)
        for attention in (*gates(net), *gates(changed)):
            attention.mix_local = share
        assert (net(tokens)[4] - changed(tokens)[4]).abs().max() < 1e-12
        assert not torch.allclose(net(tokens)[4], learned)
    for attention in gates(net):
        attention.mix_local = None
    assert torch.equal(net(tokens)[4], learned)


def one_update(net):
    tokens = text(64)
    none = torch.zeros((0, net.config.patch_values), dtype=torch.uint8)
    model = LossModel(net.requires_grad_(True))
    for attention in gates(net):
        attention.gate.requires_grad_(net.config.mix_mode == "per_head")
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    targets = tokens.roll(-1, 1)
    sums = model(tokens, targets, torch.zeros_like(tokens), none, torch.zeros((0, 2), dtype=torch.long))
    sums.ce.sum().backward()
    optimizer.step()


def test_6_gates_start_at_the_local_weight_and_only_learned_ones_move():
    for mode in ("per_head", "fixed"):
        net = net_of(mix_mode=mode)
        for attention in gates(net):
            assert (torch.sigmoid(attention.gate) - 0.7).abs().max() < 1e-6
            assert (attention.gamma() - 0.7).abs().max() < 1e-6
        before = [attention.gate.clone() for attention in gates(net)]
        one_update(net)
        moved = [not torch.equal(a.gate, b) for a, b in zip(gates(net), before, strict=True)]
        assert all(moved) if mode == "per_head" else not any(moved)
    assert Net(TEST).groups[0].blocks[0].attention.gate.requires_grad
    fixed = Net(dataclasses.replace(TEST, mix_mode="fixed"))
    assert not fixed.groups[0].blocks[0].attention.gate.requires_grad


@pytest.mark.parametrize(
    ("how", "read"),
    [  # what the last of 13 tokens (block 3 incomplete: token 12 is the tail) reads of the others
        ({"window": 1, "top_k": 1, "sinks": 1}, "1111000000001"),  # the sink block, itself
        ({"window": 4, "top_k": 1, "sinks": 1}, "1111000001111"),
        ({"window": 5, "top_k": 1, "sinks": 1}, "1111000011111"),  # a window wider by one reads one token more
        ({"window": 1, "top_k": 2, "sinks": 2}, "1111111100001"),  # two sinks: a block of 4 more
        ({"window": 1, "top_k": 3, "sinks": 1}, "1111111111111"),  # K = all complete blocks
    ],
)
def test_8_a_token_outside_both_sets_has_no_effect(how, read):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 13, h, 8, generator=g, dtype=F64) for h in (2, 1, 1))
    before = hybrid_attention(q, k, v, block=4, local_weight=0.6, **how)
    for at, expected in enumerate(read):
        touched = v.clone()
        touched[:, at] += 1.0  # values do not enter the choice
        after = hybrid_attention(q, k, touched, block=4, local_weight=0.6, **how)
        assert bool((after[:, -1] != before[:, -1]).any()) == (expected == "1"), at


@pytest.mark.parametrize(("block", "page"), BLOCKS)
@pytest.mark.parametrize("summary", ["mean", "mean_var"])
def test_11_summaries_are_those_of_the_stored_keys(block, page, summary):
    """For complete blocks alone; nobody writes the others; and a rollback leaves no trace."""
    config = dataclasses.replace(TEST, block=block, page=page, summary=summary)
    group, table = net_of(block=block, page=page, summary=summary).groups[0], torch.arange(1, 8)[None]
    x = torch.randn(41, config.width, dtype=F64, generator=torch.Generator().manual_seed(1))

    def run(cache, rows, start):
        at = torch.arange(start, start + len(rows))
        step = PagedStep(at, table[0, at // page] * page + at % page, table, [0, len(rows)], page, block)
        group.paged(rows, step, cache)

    def fresh():
        cache = GroupCache.zeros(config, 8, F64)
        cache.kv.fill_(math.nan)
        cache.summaries.fill_(math.nan)
        return cache

    straight, rolled = fresh(), fresh()
    run(straight, x, 0)
    run(rolled, x[:20], 0)
    run(rolled, x.flip(0)[:13], 20)  # rejected: the length goes back to 20
    run(rolled, x[20:], 20)
    keys = straight.kv[0, table[0], ..., : config.head_dim].transpose(1, 2).flatten(0, 1)  # [tokens, Hk, d]
    found = straight.summaries[0, table[0]].transpose(1, 2).flatten(0, 1)  # [blocks, Hk, m]
    again = rolled.summaries[0, table[0]].transpose(1, 2).flatten(0, 1)
    complete = 41 // block
    stored = keys[: complete * block].unflatten(0, (complete, block))
    want = [stored.mean(1)] + ([stored.var(1, correction=0)] if summary == "mean_var" else [])
    assert (found[:complete] - torch.cat(want, dim=-1)).abs().max() < 1e-12
    assert found[complete:].isnan().all()
    assert torch.equal(found[:complete], again[:complete])


@pytest.mark.parametrize("layers", [4, 8, 16])
def test_13_a_depth_is_a_separately_built_model_bit_for_bit(layers):
    """With a pattern of layers, images and, on the same path, no tolerance at all."""
    deep = Model.from_preset("test", dtype="float64")
    deep.config = dataclasses.replace(TEST, layers=16, attn_pattern="LHHH")
    deep.net = Net(deep.config).init_(3).double().requires_grad_(False)
    own = dataclasses.replace(deep.config, layers=layers)
    alone = Model(own, Net(own).double(), deep.tokenizer)
    state = alone.net.state_dict()
    for name in state:
        source = name
        if name.startswith("groups."):
            _, group, _, block, rest = name.split(".", 4)
            layer = int(group) * own.group_layers + int(block)
            source = f"groups.{layer // 4}.blocks.{layer % 4}.{rest}"
        elif name.startswith("exit_norms."):
            source = f"exit_norms.{layers}.weight"
        state[name] = deep.net.state_dict()[source]
    alone.net.load_state_dict(state)
    image = picture((30, 200, 30))
    ids = [*text(60)[0].tolist(), *image.tokens(), 60]
    assert torch.equal(deep.logits(ids, layers, [image]), alone.logits(ids, images=[image]))
    assert torch.equal(deep.logits(ids, 16, [image]), deep.logits(ids, "full", [image]))


def test_16_the_router_sees_the_prompt_alone_and_teaches_the_trunk_nothing():
    net = net_of().requires_grad_(True)
    prompt, answers = text(30), (text(12, 1), text(12, 2))
    router, seen = None, []
    for answer in answers:
        hidden = net(torch.cat([prompt, answer], 1), exits=(1,))[1][0, :30]
        x = features(page_sums(net, hidden, prompt[0]), hidden[-1], 30)
        router = router or fit_router(TEST, torch.randn(60, len(x)), torch.rand(60, 2), steps=20)
        seen.append((x.detach(), router.choose(x, 0.1), router.choose(x, 0.1)))
    assert (seen[0][0] - seen[1][0]).abs().max() < 1e-12
    assert len({choice for _, *choices in seen for choice in choices}) == 1
    assert all(p.grad is None for p in net.parameters())


def test_23_the_same_text_with_another_image_is_another_prompt():
    model = Model.from_preset("test", dtype="float64")
    red, green = picture((200, 30, 30)), picture((30, 200, 30))
    ids = [50, *red.tokens(), 60]
    assert red.tokens() == green.tokens() and red.sha256() != green.sha256()
    a, b, again = (model.logits(ids, images=[image]) for image in (red, green, red))
    assert torch.equal(a, again) and not torch.allclose(a[ids.index(PATCH_ID) :], b[ids.index(PATCH_ID) :])


def test_text_images_and_both_share_a_batch():
    """Rows of text alone, of an image alone and of both: each as if it were alone."""
    net = net_of()
    image, other = picture((200, 30, 30)), picture((10, 90, 250))
    rows = [text(20)[0].tolist(), image.tokens(), [40, *other.tokens(), *text(30)[0].tolist()]]
    length = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    docs = torch.tensor([[0] * len(row) + [-1] * (length - len(row)) for row in rows])
    patches = [torch.from_numpy(i.values) for i in (image, other)]
    grids = [torch.from_numpy(media.grid(row)) for row in rows]
    together = net(tokens, torch.cat(patches), torch.cat(grids), docs)[4]
    for number, (row, own) in enumerate(zip(rows, (None, patches[0], patches[1]), strict=True)):
        alone = net(torch.tensor([row]), own, grids[number] if own is not None else None)[4][0]
        assert (together[number, : len(row)] - alone).abs().max() < 1e-9


def test_attn_pattern_repeats_over_the_layers():
    """LLLH: three layers read their window alone, so their gates have no say and what is out of reach changes nothing."""
    net = net_of(attn_pattern="LLLH", layers=8, window=4)
    assert [attention.kind for attention in gates(net)] == list("LLLHLLLH")
    assert [attention.gamma() is None for attention in gates(net)] == [True, True, True, False] * 2
    layer = net.groups[0].blocks[0].attention
    x = torch.randn(1, 40, TEST.width, dtype=F64)
    layout = Layout.packed(torch.zeros(1, 40, dtype=torch.long), window=4, block=2, sinks=1)
    rope = rope_tables(layout.positions, net.config, F64)
    before = layer(x, layout, rope)
    x[:, :20] += 1
    assert torch.equal(layer(x, layout, rope)[:, 23:], before[:, 23:])
    assert not torch.equal(layer(x, layout, rope)[:, 22], before[:, 22])
