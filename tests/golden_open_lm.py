"""The golden checkpoint of open_lm, made again from its seed.

open_lm draws its weights module by module in the order in which it builds them (mlfoundations/open_lm, open_lm/model.py: PyTorch's own start, then truncated normals), so plain
torch modules built in that order after `torch.manual_seed(0)` are the very tensors of the original code. Then the norms, which the original starts at one and zero, were spread, and all
was rounded to half. `DIGEST` (by `golden_vqgan.digest`) is that of the checkpoint written with the original code; golden/open_lm_*.expected.safetensors hold the logits that it gave, for two position variants."""
import math

import torch
from torch.nn import Embedding, Linear

DIGEST = '41106fdef550617902dd3bbd53bd40708db995128d9059459be5a143988f8b04'


def trunc(module, width, layer=None):
    "open_lm's start: 1/sqrt(width), cut at three sigma, smaller in the layers that write to the residual stream"
    std = width ** -.5 / (1 if layer is None else math.sqrt(2 * (layer + 1)))
    return torch.nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)


@torch.no_grad()
def golden_checkpoint(width=64, hidden=256, layers=2, heads=4, rows=160):
    "As published: {'epoch', 'name', 'state_dict'}, keys with `module.`"
    torch.manual_seed(0)
    words, state = Embedding(rows, width), {}
    for i in range(layers):
        turn, out = Linear(width, 3 * width, bias=False), Linear(width, width, bias=False)
        state[f'layers.{i}.attention.in_proj.weight'], state[f'layers.{i}.attention.out_proj.weight'] = trunc(turn, width), trunc(out, width, i)
        w12, w3 = Linear(width, 2 * hidden, bias=False), Linear(hidden, width, bias=False)
        state[f'layers.{i}.feed_forward.w12.weight'], state[f'layers.{i}.feed_forward.w3.weight'] = trunc(w12, width), trunc(w3, hidden, i)
    head = Linear(width, rows, bias=False)
    state['output.weight'], state['tok_embeddings.weight'] = trunc(head, width), trunc(words, width)
    for norm in (*(f'layers.{i}.{part}_norm' for i in range(layers) for part in ('attention', 'ffn')), 'norm'):
        for part, start in (('weight', 1), ('bias', 0)): state[f'{norm}.{part}'] = start + .2 * torch.randn(width)
    state = {name: t.half() for name, t in state.items()}
    speeds = 1 / 10_000 ** (torch.arange(0, width // heads, 2).float() / (width // heads))
    state |= {f'layers.{i}.attention.pos_embed.inv_freq': speeds for i in range(layers)}
    return dict(epoch=1, name='open_lm_head_rotary', state_dict={f'module.{name}': t for name, t in state.items()})
