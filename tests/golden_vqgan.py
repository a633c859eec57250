"""The golden checkpoints of SBER-MoVQGAN and taming-transformers' VQGAN, made again from their seeds.

The original systems draw their weights module by module in the order in which they build them (ai-forever/MoVQGAN, movqgan/models/vqgan.py; CompVis/taming-transformers,
taming/models/vqgan.py), so plain torch modules built in that order after `torch.manual_seed` are the very tensors of the original code. Then the codebook is drawn wider than
the original start, so that several codes occur, and all is rounded to half. `DIGESTS` are those of checkpoints written with the original code, and
golden_vqgan.safetensors holds what the original code gave for `golden_images`: codes, and reconstructions (every second pixel of each side; of VQGAN the first image)."""
import hashlib

import torch

MODELS = {
    'movqgan': dict(seed=0, ch=32, ch_mult=(1, 2, 2, 4), blocks=1, attention=3, z=4, codes=64, spatial=True),
    'vqgan': dict(seed=5, ch=32, ch_mult=(1, 1, 2, 2, 4), blocks=1, attention=4, z=64, codes=128, spatial=False)}
DIGESTS = {'movqgan': '1a9dd1a839ae89f1c338d4ba56aa27b46be4ccaf0ed044723c90a421605583ad', 'vqgan': '1437ed04fdeba9ed6ebc9c08f38d51aa4b9cedc47da072dfc73f5d3841279a7a'}
CONFIGS = {kind: dict(ddconfig=dict(double_z=False, z_channels=m['z'], resolution=256, in_channels=3, out_ch=3, ch=32, ch_mult=list(m['ch_mult']), num_res_blocks=1,
                                    attn_resolutions=[256 >> m['attention']], dropout=0.), n_embed=m['codes'], embed_dim=m['z']) for kind, m in MODELS.items()}


def golden_checkpoint(seed, ch, ch_mult, blocks, attention, z, codes, spatial):
    "A state dict in the published format; attention: the level that has it."
    torch.manual_seed(seed)
    out, widths, top = {}, [ch * m for m in ch_mult], len(ch_mult) - 1
    def keep(name, module): out.update({f'{name}.{k}': v.half() for k, v in module.state_dict().items()})
    def conv(name, i, o, k=3): keep(name, torch.nn.Conv2d(i, o, k))
    def norm(name, c):
        inner = spatial and name.startswith('decoder')
        keep(f'{name}.norm_layer' if inner else name, torch.nn.GroupNorm(32, c))
        if inner: conv(f'{name}.conv_y', z, c, 1); conv(f'{name}.conv_b', z, c, 1)
    def block(name, i, o):
        norm(f'{name}.norm1', i); conv(f'{name}.conv1', i, o); norm(f'{name}.norm2', o); conv(f'{name}.conv2', o, o)
        if i != o: conv(f'{name}.nin_shortcut', i, o, 1)
    def attend(name, c):
        norm(f'{name}.norm', c)
        for part in ('q', 'k', 'v', 'proj_out'): conv(f'{name}.{part}', c, c, 1)
    def middle(name, c): block(f'{name}.mid.block_1', c, c); attend(f'{name}.mid.attn_1', c); block(f'{name}.mid.block_2', c, c)
    def level(name, i, o, n, attended):
        for j in range(n):
            block(f'{name}.block.{j}', o if j else i, o)
            if attended: attend(f'{name}.attn.{j}', o)

    conv('encoder.conv_in', 3, ch)
    for i, width in enumerate(widths):
        level(f'encoder.down.{i}', widths[max(i - 1, 0)], width, blocks, i == attention)
        if i < top: conv(f'encoder.down.{i}.downsample.conv', width, width)
    middle('encoder', widths[top]); norm('encoder.norm_out', widths[top]); conv('encoder.conv_out', widths[top], z)
    conv('decoder.conv_in', z, widths[top]); middle('decoder', widths[top])
    for i in reversed(range(top + 1)):
        level(f'decoder.up.{i}', widths[min(i + 1, top)], widths[i], blocks + 1, i == attention)
        if i: conv(f'decoder.up.{i}.upsample.conv', widths[i], widths[i])
    norm('decoder.norm_out', ch); conv('decoder.conv_out', ch, 3)
    book = torch.nn.Embedding(codes, z)
    book.weight.data.uniform_(-1 / codes, 1 / codes)
    conv('quant_conv', z, z, 1); conv('post_quant_conv', z, z, 1)
    book.weight.data.normal_()
    keep('quantize.embedding', book)
    return out


def golden_images(kind):
    "The two smooth images that the original code was given, (2, 3, px, px) in [-1, 1]."
    seed, px = {'movqgan': (1, 64), 'vqgan': (6, 128)}[kind]
    torch.manual_seed(seed)
    return torch.nn.functional.interpolate(torch.rand(2, 3, px // 8, px // 8) * 2 - 1, scale_factor=8, mode='bilinear')


def digest(state):
    "SHA-256 over the names and the bytes of a state dict, in the order of the names."
    h = hashlib.sha256()
    for name in sorted(state): h.update(name.encode()); h.update(state[name].numpy().tobytes())
    return h.hexdigest()
