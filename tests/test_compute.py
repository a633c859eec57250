"The loss in chunks, the row without padding and the faster products give what the plain ways give, and are refused where they would not."
import copy
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode

from t2ianalysis import compute
from t2ianalysis.compute import ROUND, Scored, fast_cpu, fitted, head_losses, plain_head, slow_mkl

SMALL = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, intermediate_size=64)
WIDE = SMALL | dict(initializer_range=0.3, head_dim=16)
JAMBA = SMALL | dict(attn_layer_offset=1, attn_layer_period=2, num_experts=2)
LENGTHS = (9, 20, 14, 1)


def near(a, b, most=1e-5): assert (a - b).abs().max() <= most * b.abs().max(), (a - b).abs().max() / b.abs().max()


# The loss in chunks

def case(n, d=16, v=301, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g).to(dtype), torch.randn(v, d, generator=g).to(dtype), torch.randint(v, (n,), generator=g)


def gradients(loss, h, w):
    "Of a third of a loss: the loss, and what it gives to hidden states and weight."
    h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
    total = loss(h, w)
    (total / 3).backward()
    return total.detach(), h.grad, w.grad


@pytest.fixture
def chunk(monkeypatch):
    monkeypatch.setattr(compute, 'LEAST', 1)
    return lambda rows, v=301: monkeypatch.setitem(compute.CHUNK, 'cpu', rows * v)


@pytest.mark.parametrize('n, rows, nothing', [(1, 1, []), (1, 8, []), (24, 8, [0, 7, 8, 23]), (25, 8, [24]), (25, 7, range(7, 14)), (25, 1000, []), (9, 2, range(9))])
def test_losses_and_gradients_are_the_plain_ones(n, rows, nothing, chunk):
    chunk(rows)
    h, w, y = case(n)
    y[list(nothing)] = -100
    plain, losses = F.cross_entropy(h @ w.T, y, reduction='none'), head_losses(h, w, y)[1]
    assert losses.dtype == torch.float32 and (losses[y < 0] == 0).all() and (losses - plain).abs().max() < 1e-5 * plain.abs().max().clamp(min=1)
    ours, theirs = gradients(lambda h, w: head_losses(h, w, y)[0], h, w), gradients(lambda h, w: F.cross_entropy(h @ w.T, y, reduction='sum'), h, w)
    for a, b in zip(ours, theirs): assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_any_label_below_zero_is_none(chunk):
    chunk(4)
    h, w, y = case(10)
    y[3], y[9] = -1, -7
    total, losses = head_losses(h, w, y)
    near(losses, F.cross_entropy(h @ w.T, y.where(y >= 0, -100), reduction='none'))
    near(total, losses.sum())


@pytest.mark.skipif(not hasattr(F, 'linear_cross_entropy'), reason='this PyTorch has no linear_cross_entropy')
def test_as_pytorchs_own(chunk):
    chunk(9)
    h, w, y = case(40)
    y[[0, 17, 39]] = -100
    theirs = lambda h, w, how='sum': F.linear_cross_entropy(h, w, y, reduction=how, ignore_index=-100, options=torch.nn.LinearCrossEntropyOptions())
    near(head_losses(h, w, y)[1], theirs(h, w, 'none'))
    for a, b in zip(gradients(lambda h, w: head_losses(h, w, y)[0], h, w), gradients(theirs, h, w)): near(a, b)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_bf16_autocast_is_as_exact_as_bf16(dtype, chunk):
    chunk(9)
    h, w, y = case(40, dtype=dtype)
    def loss(h, w):
        with torch.autocast('cpu', torch.bfloat16): return head_losses(h, w, y)[0]
    exact, ours = gradients(lambda h, w: F.cross_entropy(h @ w.T, y, reduction='sum'), h.double(), w.double()), gradients(loss, h, w)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == dtype
    for a, b in zip(ours, exact): near(a.double(), b, 2e-2)
    near(loss(h, w), ours[0], 0)


@pytest.mark.parametrize('frozen', [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen, chunk):
    chunk(4)
    h, w, y = case(10)
    pair, plain = [h.clone().requires_grad_(), w.clone().requires_grad_()], [h.clone().requires_grad_(), w.clone().requires_grad_()]
    pair[frozen].requires_grad_(False)
    head_losses(*pair, y)[0].backward()
    F.cross_entropy(plain[0] @ plain[1].T, y, reduction='sum').backward()
    assert pair[frozen].grad is None
    near(pair[1 - frozen].grad, plain[1 - frozen].grad)


class Seen(TorchDispatchMode):
    "Numbers of the largest tensor that an operation makes, and how many matrix products there are."
    def __init__(self): super().__init__(); self.largest, self.products = 0, 0
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.largest, self.products = max([self.largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))]), self.products + (op in (torch.ops.aten.mm.default, torch.ops.aten.matmul.default))
        return out


def test_memory_is_that_of_a_chunk(chunk):
    h, w, y = case(100)
    h.requires_grad_(); w.requires_grad_()
    chunk(20)
    with Seen() as seen: head_losses(h, w, y)[0].backward()
    assert seen.largest == 20 * 301 and seen.products == 3 * 5                 # of 100 x 301 logits
    chunk(1)
    with Seen() as seen: head_losses(h, w, y)[0].backward()
    assert seen.largest == 301 * 16                                             # the gradient of the weight


@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_logits_are_computed(context, chunk):
    chunk(20)
    h, w, y = case(100)
    h.requires_grad_(); w.requires_grad_()
    with context(), Seen() as seen: total, losses = head_losses(h, w, y)
    assert seen.products == 5 and not total.requires_grad and not losses.requires_grad


def test_gradients_are_given_once():
    h, w, y = case(10)
    h.requires_grad_()
    total, losses = head_losses(h, w, y)
    assert total.requires_grad and not losses.requires_grad
    total.backward(retain_graph=True)
    before = h.grad.clone()
    with pytest.raises(RuntimeError, match='differentiated once'): total.backward()
    assert torch.equal(h.grad, before)


# Sequences without padding

def batch(lm, lengths=LENGTHS, seed=0):
    ids = torch.randint(lm.get_input_embeddings().weight.shape[0], (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return ids, ids.roll(-1, 1).masked_fill(torch.arange(max(lengths))[None] >= torch.tensor(lengths)[:, None], -100)


def plain_losses(lm, ids, labels): return F.cross_entropy(lm(ids, use_cache=False).logits.float().flatten(0, 1), labels.flatten(), reduction='none').view(labels.shape)
def make(config, seed=0):
    torch.manual_seed(seed)
    return hf.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()  # a model writes into its config


@pytest.mark.parametrize('length', [0, 64, 100])
@pytest.mark.parametrize('lengths', [(9, 20, 14, 1), (5,), (1,), (33, 32), (7, 7, 7), (1, 1, 60), (64,)])
def test_a_row_is_fitted(lengths, length):
    "All that is predicted, in order, then padding up to a multiple of 64 where there is the room, with columns added up to `length`."
    ids, labels = batch(make(hf.LlamaConfig(**SMALL)), lengths)
    inputs, more, slots = fitted(ids, labels, length)
    n, width = sum(lengths), max(lengths)
    assert len(slots) == min(-(-n // ROUND) * ROUND, more.numel()) and len(slots.unique()) == len(slots) and (length == 0 or len(slots) % ROUND == 0)
    assert inputs.shape == more.shape and width <= more.shape[1] <= max(length, width)
    assert torch.equal(inputs[:, :width], ids) and torch.equal(more[:, :width], labels) and (more[:, width:] == -100).all()
    assert slots[:n].tolist() == (more.flatten() >= 0).nonzero()[:, 0].tolist() and (more.flatten()[slots[n:]] < 0).all()


CONFIGS = dict(
    llama=hf.LlamaConfig(**WIDE), tied=hf.LlamaConfig(**WIDE, tie_word_embeddings=True), gpt2=hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3),
    nope=hf.StableLmConfig(**WIDE, partial_rotary_factor=0.0), stablelm=hf.StableLmConfig(**WIDE, partial_rotary_factor=1.0), granite=hf.GraniteConfig(**WIDE, logits_scaling=4.0),
    mixtral=hf.MixtralConfig(**WIDE, num_local_experts=4), gemma2=hf.Gemma2Config(**WIDE, sliding_window=8), mamba=hf.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4))
NOT_LEAN, NOT_UNPADDED = ('granite', 'gemma2'), ('gemma2', 'mamba')


@pytest.mark.parametrize('name', CONFIGS)
def test_scored_gives_the_plain_losses_and_gradients(name):
    plain = make(CONFIGS[name])
    scored = Scored(copy.deepcopy(plain), 20)
    assert (scored.lean, scored.unpadded) == (name not in NOT_LEAN, name not in NOT_UNPADDED)
    ids, labels = batch(plain)
    shapes = []
    scored.lm.get_input_embeddings().register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    total, losses = scored(ids, labels)
    assert shapes == [(1, 64) if scored.unpadded else (4, 20)]
    expected = plain_losses(plain, ids, labels)
    near(losses, expected.detach())
    near(total, expected.sum())
    total.backward(); expected.sum().backward()
    most = max(p.grad.abs().max() for p in plain.parameters())
    for p, q in zip(scored.lm.parameters(), plain.parameters()): assert (p.grad is None) == (q.grad is None) and (p.grad is None or (p.grad - q.grad).abs().max() <= 1e-5 * most)
    for i, n in enumerate(LENGTHS): near(losses[i, :n], plain_losses(plain, ids[i:i + 1, :n], labels[i:i + 1, :n])[0].detach())


@pytest.mark.parametrize('name', ['llama', 'nope', 'gemma2'])
def test_what_is_in_the_padding_or_in_other_documents_is_never_seen(name):
    scored = Scored(make(CONFIGS[name]), 20)
    ids, labels = batch(scored.lm)
    other = torch.where(labels < 0, 49 - ids, ids)
    other[1:] = 49 - other[1:]
    with torch.no_grad(): near(scored(other, labels)[1][0], scored(ids, labels)[1][0])


def test_activation_checkpointing_keeps_the_documents_apart():
    plain = make(CONFIGS['nope'])
    lm = copy.deepcopy(plain).train()
    scored = Scored(lm, 20)
    lm.gradient_checkpointing_enable(dict(use_reentrant=False))
    ids, labels = batch(plain)
    scored(ids, labels)[0].backward()
    plain_losses(plain, ids, labels).sum().backward()
    for p, q in zip(lm.parameters(), plain.parameters()): near(p.grad, q.grad, 1e-4)


def test_slots_made_elsewhere_and_bf16():
    scored = Scored(make(CONFIGS['llama']), 20)
    ids, labels = batch(scored.lm)
    with torch.no_grad():
        assert torch.equal(scored(ids, labels)[1], scored(*fitted(ids, labels))[1])
        with torch.autocast('cpu', torch.bfloat16): near(scored(ids, labels)[1], plain_losses(make(CONFIGS['llama']), ids, labels), 5e-2)


def test_measuring_leaves_the_model_as_it_was():
    lm = make(CONFIGS['gemma2']).train()
    before, state = lm.config._attn_implementation, torch.get_rng_state()
    scored = Scored(lm, 20)
    assert lm.config._attn_implementation == before and lm.training and torch.equal(state, torch.get_rng_state()) and not any(m._forward_pre_hooks for m in lm.modules())
    ids, labels = batch(lm)
    scored(ids, labels)[0].backward()


def test_a_model_without_padding_is_not_called_otherwise():
    lm = make(CONFIGS['llama'])
    ids, labels = batch(lm)
    with torch.no_grad(): plain = plain_losses(lm, ids, labels)
    scored = Scored(lm, 20)
    for options in ({}, dict(attention_mask=torch.ones_like(ids))):
        with pytest.raises(ValueError, match='called by `Scored`'): lm(ids, use_cache=False, **options)
    with pytest.raises(ValueError, match='called by `Scored`'): lm.generate(ids, max_new_tokens=2, pad_token_id=0)
    assert scored.unpadded
    lm.set_attn_implementation('sdpa')
    with torch.no_grad(): assert torch.equal(plain_losses(lm, ids, labels), plain)


@pytest.mark.parametrize('config', [
    hf.MistralConfig(**WIDE, sliding_window=64), hf.Olmo3Config(**SMALL | dict(num_hidden_layers=4), sliding_window=64), hf.Gemma3TextConfig(**WIDE, sliding_window=64),
    hf.Llama4TextConfig(**WIDE, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=64, attention_chunk_size=64, pad_token_id=0),
    hf.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=64, max_window_layers=0), hf.Phi3Config(**SMALL, sliding_window=64, pad_token_id=0)], ids=lambda c: c.model_type)
def test_padding_stays_where_attention_does_not_see_a_whole_sequence(config):
    "Documents of at most 64 tokens lie within the window, longer ones do not, though the probe's documents would."
    lm = make(config)
    if config.model_type not in ('llama4_text',): assert Scored(lm, 64).unpadded  # its chunked layers have needs of their own
    lm = make(config)
    scored = Scored(lm, 65)
    assert not scored.unpadded
    ids, labels = batch(lm)
    with torch.no_grad(): near(scored(ids, labels)[1], plain_losses(lm, ids, labels))


@pytest.mark.parametrize('config', [hf.GptOssConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2, sliding_window=256, pad_token_id=0),  # sinks
                                    hf.Gemma2Config(**SMALL, head_dim=16, sliding_window=64),                                                # capped scores
                                    hf.JambaConfig(**JAMBA),                                                                                     # a state runs on
                                    hf.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=2)], ids=lambda c: c.model_type)          # distances from the mask
def test_padding_stays_though_small_weights_hide_the_difference(config):
    lm = make(config)
    assert not Scored(lm, 20).unpadded


def test_padding_stays_where_a_state_that_still_writes_nothing_would_mix_tokens_later():
    lm = make(hf.JambaConfig(**JAMBA))
    with torch.no_grad():
        for layer in lm.model.layers:
            if hasattr(layer, 'mamba'): layer.mamba.out_proj.weight.zero_()
    assert not Scored(lm, 20).unpadded


@pytest.mark.parametrize('config, lean', [(hf.LlamaConfig(**SMALL), True), (hf.Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=30.0), False), (hf.GraniteConfig(**SMALL, logits_scaling=1.5), False),
                                          (hf.CohereConfig(**SMALL, logit_scale=0.5), False), (hf.PhiConfig(**SMALL), False), (hf.Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=None), True)])
def test_a_head_that_caps_scales_or_shifts_is_seen(config, lean):
    "With fresh weights the logits are small, and a cap of 30 changes them by less than a thousandth."
    assert plain_head(make(config)) is lean


# Matrix products on a CPU

@pytest.fixture
def slow(monkeypatch):
    if not torch.backends.mkldnn.is_available(): pytest.skip('this PyTorch has no oneDNN')
    monkeypatch.setattr(compute, 'slow_mkl', lambda: True)


def numbers(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


A, B, C = numbers(130, 120), numbers(120, 110, seed=1), numbers(110, seed=2)
PRODUCTS = dict(
    contiguous=lambda a, b, c: a @ b, transposed=lambda a, b, c: (b.T @ a.T).T, strided=lambda a, b, c: torch.cat([a, a], 1)[:, ::2] @ torch.cat([b, b])[::2],
    expanded=lambda a, b, c: a[:1].expand(130, 120) @ b, expanded_weight=lambda a, b, c: a @ b[:, :1].expand(120, 110), sliced=lambda a, b, c: a[3:, 5:] @ b[5:, 7:],
    one_row=lambda a, b, c: a[:1].repeat(1, 30) @ b.repeat(30, 1), one_column=lambda a, b, c: a.repeat(1, 30) @ b.repeat(30, 1)[:, :1], small=lambda a, b, c: a[:3, :3] @ b[:3, :3],
    linear=lambda a, b, c: F.linear(a, b.T, c), linear_3d=lambda a, b, c: F.linear(a.view(2, 65, 120), b.T.contiguous(), c), addmm=lambda a, b, c: torch.addmm(c, a, b),
    addmm_scaled=lambda a, b, c: torch.addmm(c, a, b, beta=0.5, alpha=2), addmm_2d=lambda a, b, c: torch.addmm(c.expand(130, 110), a, b), addmm_one=lambda a, b, c: torch.addmm(c[:1], a, b), no_rows=lambda a, b, c: a[:0] @ b, no_columns=lambda a, b, c: a[:, :0] @ b[:0])


@pytest.mark.parametrize('name', PRODUCTS)
def test_products_are_as_exact_as_before(name, slow):
    product = PRODUCTS[name]
    exact, before = product(A.double(), B.double(), C.double()), product(A, B, C)
    with fast_cpu(): inside = product(A, B, C)
    error = lambda x: (x.double() - exact).abs().max().item() if exact.numel() else 0
    assert inside.shape == before.shape and inside.dtype == before.dtype and error(inside) <= max(2 * error(before), 1e-5 * exact.abs().max().item() if exact.numel() else 0)
    assert torch.equal(product(A, B, C), before)                                # outside, as before


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.complex64])
def test_other_types_are_left_alone(dtype, slow):
    a, b = (numbers(*s, dtype=torch.float32).mul(9).to(dtype) for s in ((130, 120), (120, 110)))
    before = a @ b
    with fast_cpu(): assert torch.equal(a @ b, before)


def uses_onednn():
    "Whether a product of now goes to oneDNN, as told by the profiler."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p: A @ B
    return any('mkldnn' in e.key for e in p.key_averages())


def test_it_ends_with_the_context_nested_or_not_and_after_an_error(slow):
    assert not uses_onednn()
    with fast_cpu():
        assert uses_onednn()
        with fast_cpu(): assert uses_onednn()
        assert uses_onednn()
    assert not uses_onednn()
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'), fast_cpu(): numbers(130, 120) @ numbers(130, 120)
    assert not uses_onednn()
    with fast_cpu(): assert uses_onednn()
    assert not uses_onednn()


def test_shapes_that_do_not_fit_are_refused_as_before(slow):
    for a, b in ((A, A), (A, B[:1])):
        with pytest.raises(RuntimeError) as before: a @ b
        with pytest.raises(RuntimeError) as inside, fast_cpu(): a @ b
        assert str(inside.value) == str(before.value)


def test_training_inside_is_training_outside(slow):
    def step():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(120, 200), torch.nn.GELU(), torch.nn.Linear(200, 110))
        with torch.no_grad(): torch.nn.init.normal_(net[0].weight)
        net(A).square().mean().backward()
        return [p.grad for p in net.parameters()]
    before = step()
    with fast_cpu(): inside = step()
    for a, b in zip(inside, before): near(a, b)
    with fast_cpu(), torch.inference_mode(): near(A @ B, (A.double() @ B.double()).float())


def test_in_other_threads_too(slow):
    found = {}
    with fast_cpu():
        thread = threading.Thread(target=lambda: found.update(product=A @ B))
        thread.start(); thread.join()
        near(found['product'], (A.double() @ B.double()).float())
    x = numbers(130, 120).requires_grad_()
    with fast_cpu(): loss = (x @ B).sum()
    loss.backward()                                                             # after it has ended, in autograd's thread
    near(x.grad, B.sum(1).expand(130, 120))


def test_nothing_is_done_where_mkl_is_not_slow(monkeypatch):
    monkeypatch.setattr(compute, 'slow_mkl', lambda: False)
    before = A @ B
    with fast_cpu(): assert torch.equal(A @ B, before)


@pytest.mark.parametrize('vendor, level, slow_one', [('AuthenticAMD', 'AVX512', True), ('AuthenticAMD', 'AVX2', False), ('GenuineIntel', 'AVX512', False), (None, 'DEFAULT', False)])
def test_which_processors_are_slow(vendor, level, slow_one, tmp_path, monkeypatch):
    (tmp_path/'cpuinfo').write_text(f'processor\t: 0\nvendor_id\t: {vendor}\n' if vendor else 'processor : 0\nCPU implementer : 0x41\n')
    monkeypatch.setattr(compute, 'Path', lambda _: tmp_path/'cpuinfo')
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: level)
    for part in ('mkl', 'mkldnn'): monkeypatch.setattr(getattr(torch.backends, part), 'is_available', lambda: True)
    assert slow_mkl() is slow_one
    monkeypatch.setattr(compute, 'Path', lambda _: tmp_path/'none')
    assert slow_mkl() is False


def test_a_mask_of_the_architecture_is_refused():
    "By name of what attention is given: a bias by positions, sinks, keys that were chosen."
    q, grid, module = torch.zeros(1, 2, 3, 4), compute.Grid(torch.arange(3), 1, 3), SimpleNamespace(is_causal=True)
    assert compute._attention(module, q, q, q, grid, position_ids=torch.arange(3)[None], dropout=0.0)[0].shape == (1, 3, 2, 4)
    for more in (dict(position_bias=torch.zeros(1, 2, 3, 3)), dict(s_aux=torch.zeros(2)), dict(indices=torch.zeros(1, 3, 1)), dict(softcap=30.0)):
        with pytest.raises(ValueError, match='|'.join(more)): compute._attention(module, q, q, q, grid, **more)
    with pytest.raises(ValueError, match='a window or a mask'): compute._attention(module, q, q, q, None)


def test_liger_computes_the_same(tmp_path):
    "Its kernel, interpreted, in a process of its own, as Triton reads the environment when it is imported."
    for name in ('triton', 'liger_kernel'): pytest.importorskip(name)
    code = """
import torch
from t2ianalysis.compute import _by_liger, _in_chunks
for n, d, v in ((10, 16, 50), (300, 8, 70)):
    h, w, y = torch.randn(n, d), torch.randn(v, d), torch.randint(v, (n,))
    y[3], y[5] = -100, -1
    for need in ((True, True), (True, False), (False, True), (False, False)):
        for a, b in zip(_by_liger(h, w, y, torch.float32, need), _in_chunks(h, w, y, torch.float32, need), strict=True):
            assert (a is None) == (b is None) and (a is None or a.dtype == b.dtype and (a - b).abs().max() <= 1e-5 * b.abs().max()), (n, need)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=dict(os.environ, TRITON_INTERPRET='1'))
    assert done.returncode == 0, done.stderr[-2000:]
