"Minimal HTML: what stays is in order and readable, what goes is gone, nothing hostile takes the machine, and codes stand in `src`."
import io
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from t2ianalysis import minimal_html as module
from t2ianalysis.data import BadInput, data_path, memory
from t2ianalysis.minimal_html import (
    Pages,
    crop_image,
    decode_page,
    insert_codes,
    load_pages,
    make_corpus,
    minimal_html,
    minimal_page,
    near_groups,
    page_images,
    read_image,
    save_corpus,
    save_pages,
    split_pages,
    write_codes,
)


class Tags(HTMLParser):
    "Another parser's account of a page: its tags with attributes, and its text"
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts = [], []
        self.feed(page); self.close()
    def handle_starttag(self, tag, attrs): self.tags.append((tag, attrs))
    def handle_data(self, data): self.texts.append(data)


def letters(text): return ''.join(text.split())


NAMES = ['div', 'p', 'span', 'b', 'a', 'table', 'tr', 'td', 'ul', 'li', 'h1', 'br', 'img', 'pre', 'xmp', 'plaintext', 'title', 'head', 'body', 'html', 'script', 'style', 'form',
         'input', 'header', 'footer', 'dialog', 'iframe', 'svg', 'math', 'noscript', 'template', 'meta', 'link', 'textarea', 'select', 'option', 'x:y', 'my-tag', 'image', 'a"b', 'frameset']
ATTRIBUTES = ['class="header"', 'class=c', 'id=copyright', 'itemprop="a b"', 'itemprop=b', 'itemscope', 'itemtype="http://schema.org/Thing"', 'href="b.html"', 'href="javascript:x()"',
              'href="java\tscript:x()"', 'src="c.png"', 'src="data:image/png;base64,AA"', 'alt="a &quot;b&quot; <i>"', "title='<script>x()</script>'", 'onclick="x()"', 'style=x',
              'property="og:title"', 'name=twitter:card', 'content="x  y"', 'role=dialog', '"', 'SRC=D', 'typeof=Person']
TEXTS = ['word', ' ', 'two words', '\n\n', '&lt;script&gt;', '&amp;lt;', '© 2020 A', 'Copyright 2020 B', '\0', '&#0;', '&#1;', '\xa0', '&nbsp;', '<', '</', '<!--', '-->', '<![CDATA[', ']]>', '<?php ?>', 'é日🐟', '\ud800', '"', '>']
IMAGES = ['<img src=a.png>', '<img alt="a" src="1 2 3" title=b>', '<p><img src=b.png></p>', '<a href=c><img src=d></a>']
pieces = st.one_of(st.sampled_from(TEXTS), st.sampled_from(IMAGES), st.tuples(st.sampled_from(NAMES), st.lists(st.sampled_from(ATTRIBUTES), max_size=4)).map(lambda t: f'<{t[0]} {" ".join(t[1])}>'),
                   st.sampled_from(NAMES).map(lambda name: f'</{name}>'), st.text(max_size=6))


def or_none(page):
    try: return minimal_page(page)
    except BadInput as e:
        assert 'no text' in str(e), e
        return None


@settings(max_examples=400, deadline=None)
@given(st.lists(pieces, max_size=25).map(''.join))
def test_any_tag_soup_becomes_html_that_is_its_own_minimum(soup):
    page = or_none(soup)
    if page is None: return
    again = minimal_page(page.html)
    assert (again.html, again.text, again.images) == (page.html, page.text, page.images)
    seen = Tags(page.html)
    assert letters(''.join(seen.texts)) == letters(page.text)
    assert [dict(attrs)['src'] for tag, attrs in seen.tags if tag == 'img'] == page.images
    for tag, attrs in seen.tags:
        assert [key for key, _ in attrs] == sorted({key for key, _ in attrs})
        assert tag not in 'script style iframe form input dialog header footer svg noscript template textarea'.split()
        assert not {key for key, _ in attrs} & {'onclick', 'style', 'class', 'id', 'role'}
        assert not [v for k, v in attrs if k in ('href', 'src') and re.match(r'\s*(java\s*script|data)\s*:', v)]
        assert (tag not in ('img', 'meta')) or 'src' in dict(attrs) or 'content' in dict(attrs)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_end_well(raw):
    page = or_none(raw)
    assert page is None or minimal_html(page.html) == page.html


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.sampled_from(['one', 'two &amp; three', 'four <b>five</b> six', '<img alt=i src=j.png>']),
                    lambda inner: st.tuples(st.sampled_from(['<div>{}</div>', '<ul><li>{}</li></ul>', '<table><tr><td>{}</td></tr></table>', '<div class=c>{}<p></p></div>', '{}<br>tail']),
                                            st.lists(inner, min_size=1, max_size=3).map('\n'.join)).map(lambda t: t[0].format(t[1])), max_leaves=12))
def test_all_text_of_a_clean_page_stays_in_order(body):
    page, seen = or_none(f'<html><body>{body}<p>end</p></body></html>'), Tags(f'<body>{body}<p>end</p>')
    assert letters(page.text) == letters(''.join(seen.texts)) and len(page.images) == sum(tag == 'img' for tag, _ in seen.tags)


def body(page): return re.fullmatch(r'<html><body>(.*)</body></html>', minimal_html(page), re.S)[1]


@pytest.mark.parametrize(('page', 'minimal'), [
    ('<div itemprop="a"><div itemprop="b a" itemscope>x</div></div>', '<div itemprop="a b" itemscope>x</div>'),
    ('<div><div><div>x</div></div></div>', '<div>x</div>'),
    ('<div><div>x</div><div>y</div></div>', '<div><div>x</div><div>y</div></div>'),
    ('<div>a<div>x</div></div>', '<div>a<div>x</div></div>'),
    ('<p>a <span>  </span> b</p><p></p><ul><li></li></ul>', '<p>a b</p>'),
    ('<p>a</p><p><img src=i.png></p><p><img alt=x></p>', '<p>a</p><p><img src="i.png"></p>'),
    ('<a title=t href=u>a</a>', '<a href="u" title="t">a</a>'),
    ('<p>a<p>&copy; 2020 Me. All rights reserved.<p>b', '<p>a</p><p>b</p>'),
    ('<p>a<p>Copyright law is a field of law.', '<p>a</p><p>Copyright law is a field of law.</p>'),
    ('<p>a<div class="copyright">Me</div><div id=site-footer>x</div><div role=banner>x</div>', '<p>a</p>'),
    ('<h1>kept</h1><p class="table-header">kept too', '<h1>kept</h1><p>kept too</p>'),
    ('<p>a<!-- b --><?c?>d', '<p>ad</p>'),
    ('a<br>b<hr>c', 'a b c'),
    ('<xmp><b>x</b></xmp>', '<pre>&lt;b&gt;x&lt;/b&gt;</pre>'),
])
def test_the_passes(page, minimal):
    assert body(page) == minimal


def test_the_head_keeps_the_title_and_the_graphs():
    page = '<head><title>T</title><meta charset=utf-8><meta name=viewport content=x><meta property="og:image" content="u"><meta name="twitter:card" content=s><meta http-equiv=refresh content="0;x"></head>b'
    assert minimal_html(page) == '<html><head><title>T</title><meta content="u" property="og:image"><meta content="s" name="twitter:card"></head><body>b</body></html>'


def test_what_goes_is_counted():
    page = minimal_page('<p class=c>x</p><script>a</script><script>b</script><form>c</form><iframe></iframe><p></p><div><div>y</div></div><nav>n</nav><img>', drop='//nav')
    assert page.counts == Counter({'script': 2, 'form': 1, 'iframe': 1, 'empty': 1, 'folded': 1, 'attribute': 1, 'asked for': 1, 'image without src': 1})
    for wrong in ('//[', 'count(//p)', '//p/@class'):
        with pytest.raises(BadInput, match='XPath'): minimal_page('<p class=a>x', drop=wrong)


@pytest.mark.parametrize(('page', 'says'), [
    ('', 'no text'), ('<p> &nbsp; </p>', 'no text'), ('<img src=a.png>', 'no text'), ('<script>x</script>', 'no text'), ('<b>' * 3000 + 'x', '2,000 levels'),
    ('<div>' * 100_000 + 'x' + '</div>' * 100_000, '2,000 levels'), ('<p ' + 'a=1 ' * 1500 + '>x', '1,000 attributes'), ("<p a='>' " + 'a="1"' * 1500 + '>x', '1,000 attributes'),
    ('<p>' * 500_001 + 'x', '500,000 tags'), (b'x' * (16 * 2**20 + 1), '16 MB')])
def test_a_page_that_cannot_be_is_one_sentence(page, says):
    start = time.monotonic()
    with pytest.raises(BadInput, match=says) as e: minimal_page(page, 'a.html')
    assert str(e.value).startswith('a.html') and '\n' not in str(e.value) and time.monotonic() - start < 5


@pytest.mark.parametrize('page', [
    '<p>x' + '<script>' + '<p>y' * 100_000 + '</script>z', '<p>x' + '&amp;' * 200_000, '<p>x' + '<i></i>' * 50_000, 'x<script></script>' * 50_000, '<p>x' + '\0' * 10**6, '<p>x<!--' * 50_000,
    '<p>x' + '<b><i></b>' * 900, '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + '<!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">' * 20 + ']><p>x&b;', '<table>x' * 900, '<p>x' + '<a' * 100_000, 'x<' * 100_000,
    '<div><div>x</div>' * 1900], ids=lambda page: page[:20])
def test_a_hostile_page_is_clean_and_quick(page):
    start, before = time.monotonic(), memory('VmRSS')
    clean = or_none(page)
    assert clean is not None and 'x' in clean.text and minimal_html(clean.html) == clean.html
    assert time.monotonic() - start < 15 and not memory('VmRSS') - before > 300


@pytest.mark.parametrize(('raw', 'text'), [
    ('é日'.encode(), 'é日'), ('é'.encode('latin-1'), 'é'), (b'\xef\xbb\xbf' + 'é'.encode(), 'é'), ('é日'.encode('utf-16'), 'é日'), (b'<meta charset=nonsense>' + 'é'.encode(), 'é'),
    (b'<meta charset=utf-8>a\xffb', 'a\ufffdb'), (b'<meta charset=punycode>' + b'a-' * 50, 'a-' * 50), (b'<?xml version="1.0" encoding="windows-1251"?>' + 'д'.encode('cp1251'), 'д')])
def test_encodings(raw, text):
    assert decode_page(raw).endswith(text)


@pytest.fixture
def folder(tmp_path, make):
    "Pages with pictures: whole, broken, missing, outside"
    (tmp_path/'site'/'images').mkdir(parents=True)
    make['noise'](0, 40).save(tmp_path/'site'/'images'/'a b.png'); make['noise'](1, 40).resize((90, 40)).save(tmp_path/'site'/'wide.png'); make['noise'](2).save(tmp_path/'outside.png')
    (tmp_path/'site'/'broken.png').write_bytes((tmp_path/'outside.png').read_bytes()[:60]); (tmp_path/'site'/'text.png').write_text('text')
    (tmp_path/'site'/'page.html').write_text('<p>one <img alt=A src="images/a%20b.png#x"> two <img src="/wide.png"> three <img src=broken.png> <img src=text.png> <img src=gone.png> <img src="../outside.png"> '
                                             '<img src="http://example.org/a.png"> <img src="//example.org/a.png">', encoding='utf-8')
    (tmp_path/'site'/'empty.htm').write_text('<script>x</script>'); (tmp_path/'site'/'deep.HTML').write_text('<b>' * 3000 + 'x'); (tmp_path/'site'/'note.txt').write_text('no page')
    os.symlink(tmp_path/'outside.png', tmp_path/'site'/'link.png')
    return tmp_path/'site'


def test_a_folder_of_pages(folder, tmp_path):
    pages = Pages(folder)
    for _ in range(2):
        assert [p.name for p in pages] == ['page.html'] and pages.skipped == {'no text': 1, 'nested over 2,000 levels deep': 1}
    assert [p.name for p in Pages(folder/'page.html')] == ['page.html']
    (tmp_path/'none').mkdir()
    for source, says in ((tmp_path/'none', 'has no HTML file'), (tmp_path/'gone', 'does not exist')):
        with pytest.raises(BadInput, match=says): Pages(source)
    with pytest.raises(BadInput, match='XPath'): list(Pages(folder, drop='//['))


def test_images_are_found_only_where_they_may_be(folder):
    page, = Pages(folder)
    images = page_images(page, 16)
    assert [image and image.size for image in images] == [(16, 16)] * 2 + [None] * 6
    reasons = {k: v for k, v in page.counts.items() if k.startswith('image: ')}
    assert reasons == {'image: truncated or damaged': 1, 'image: not an image': 1, 'image: no file': 1, 'image: outside the folder': 1, 'image: an address, not a file': 2}
    for src in ('link.png', 'images', '%00', 'a' * 5000, 'http://[', 'file:///etc/passwd', '%2e%2e/outside.png'):
        with pytest.raises(ValueError): read_image(page, src)


def test_addresses_are_asked_only_when_asked_for(folder, monkeypatch):
    asked, raw = [], (folder/'wide.png').read_bytes()
    def answer(request, timeout): asked.append(request.full_url); return io.BufferedReader(io.BytesIO(raw))
    monkeypatch.setattr(module, 'build_opener', lambda *handlers: SimpleNamespace(open=answer))
    page, = Pages(folder)
    page_images(page, 16)
    assert asked == []
    assert [image is not None for image in page_images(page, 16, urls=True)][6:] == [True, True]
    assert asked == ['http://example.org/a.png', 'https://example.org/a.png']
    monkeypatch.setattr('t2ianalysis.minimal_html.MAX_BYTES', 10)
    with pytest.raises(ValueError, match='over'): read_image(page, 'http://example.org/a.png', urls=True)


@pytest.fixture
def server(folder):
    "On the loopback: /a.png is an image, any other path redirects to the address after it"
    raw, asked = (folder/'wide.png').read_bytes(), []
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path == '/a.png' else 302)
            if self.path != '/a.png': self.send_header('Location', self.path[1:])
            self.end_headers()
            if self.path == '/a.png': self.wfile.write(raw)
        def log_message(self, *_): pass
    made = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield SimpleNamespace(port=made.server_port, asked=asked, raw=raw)
    made.shutdown(); made.server_close()


def test_no_page_reaches_into_the_own_network(folder, server, monkeypatch):
    page, = Pages(folder)
    read = lambda address: read_image(page, address, urls=True)
    for host in ('127.0.0.1', 'localhost', '[::1]', '[::ffff:127.0.0.1]', '0.0.0.0', '2130706433', '127.1', 'user@127.0.0.1'):
        with pytest.raises(ValueError, match='private network'): read(f'http://{host}:{server.port}/a.png')
    for host in ('10.1.2.3', '192.168.0.1', '172.16.0.1', '169.254.169.254', '[fe80::1]', '[fd00::1]', '100.64.0.1', '224.0.0.1'):
        with pytest.raises(ValueError, match='private network'): read(f'https://{host}/a.png')
    assert server.asked == []
    here, port = f'http://127.0.0.1:{server.port}', server.port
    monkeypatch.setattr(module, '_public', lambda ip: ip == '127.0.0.1')         # as if it were a host of the network
    assert read(f'{here}/a.png') == read(f'{here}/{here}/a.png') == server.raw
    server.asked.clear()
    for target in (f'http://127.0.0.2:{port}/a.png', f'https://10.0.0.1:{port}/a.png', f'ftp://127.0.0.2:{port}/a.png'):
        with pytest.raises(ValueError, match='private network'): read(f'{here}/{target}')
    assert len(server.asked) == 3
    for wrong in ('http://nowhere.invalid/a.png', f'{here}/file:///etc/passwd', 'http://127.0.0.1:99999/', 'http://' + 'a' * 70 + '.x/'):
        with pytest.raises(ValueError): read(wrong)


def test_crops_are_squares_of_the_image_drawn_by_name():
    ramp = np.broadcast_to(np.arange(100, dtype='uint8')[None, :, None] * 2, (20, 100, 3))
    file = io.BytesIO(); Image.fromarray(ramp).save(file, 'PNG')
    starts = [np.asarray(crop_image(file.getvalue(), 20, 'x', i))[0, 0, 0] // 2 for i in range(200)]
    assert min(starts) < 5 and max(starts) > 75 and len(set(starts)) > 60 and all(0 <= s <= 80 for s in starts)
    assert starts[:5] == [np.asarray(crop_image(file.getvalue(), 20, 'x', i))[0, 0, 0] // 2 for i in range(5)]
    Image.new('RGB', (1, 20_000)).save(thin := io.BytesIO(), 'PNG')
    assert crop_image(thin.getvalue(), 256).size == (256, 256)


def test_codes_stand_in_src(folder, vq_folder):
    from t2ianalysis.tokenizers import load_image_tokenizer
    tokenizer = load_image_tokenizer(str(vq_folder))
    page, = Pages(folder)
    coded = insert_codes(page, tokenizer, px=16, batch=1)
    expected = [' '.join(map(str, tokenizer.encode(tokenizer.preprocess(image)[None]).ravel().tolist())) for image in page_images(page, 16) if image]
    assert coded.images == expected and len(expected) == 2 and coded.counts['image dropped'] == 6
    assert f'<p>one <img alt="A" src="{expected[0]}"> two <img src="{expected[1]}"> three</p>' in coded.html and coded.text == page.text
    assert minimal_html(coded.html) == coded.html and coded.images == insert_codes(page, tokenizer, px=16).images
    with pytest.raises(BadInput, match='px=17'): insert_codes(page, tokenizer, px=17)
    with pytest.raises(BadInput, match='8 images, but codes for 1'): write_codes(page, [None])
    assert '<img' not in write_codes(page, [None] * 8).html
    assert write_codes(page, [torch.tensor([[1, 2], [3, 4]])] + [None] * 7).images == ['1 2 3 4']


def write_warc(path, records):
    with open(path, 'wb') as file:
        writer = WARCWriter(file, gzip=path.suffix == '.gz')
        for i, (kind, status, body, *name) in enumerate(records):
            head = StatusAndHeaders(status, [('Content-Type', kind)], protocol='HTTP/1.0')
            writer.write_record(writer.create_warc_record(f'http://example.org/{name[0] if name else i}', 'response', io.BytesIO(body), http_headers=head))
    return path


@pytest.mark.parametrize('name', ['a.warc', 'a.warc.gz'])
def test_pages_of_a_warc_file(tmp_path, name):
    path = write_warc(tmp_path/name, [('text/html; charset="windows-1251"', '200 OK', '<p>да<img src=i.png>'.encode('cp1251')), ('image/png', '200 OK', b'x'), ('text/html', '404 Not Found', b'<p>no'),
                                      ('text/html', '200 OK', b'<script>x</script>'), ('application/xhtml+xml', '200 OK', '<p>é'.encode())])
    pages = Pages(path)
    assert [(p.name, p.text, p.images) for p in pages] == [('http://example.org/0', 'да', ['i.png']), ('http://example.org/4', 'é', [])] and pages.skipped == {'no text': 1}
    assert page_images(next(iter(pages)), 16) == [None]
    path.write_bytes(b'no such thing' * 100)
    with pytest.raises(BadInput, match='no WARC'): list(Pages(path))


@pytest.mark.parametrize('name', ['a.warc', 'a.warc.gz'])
def test_images_of_a_warc_file_are_records_of_it(tmp_path, make, name):
    one, two = io.BytesIO(), io.BytesIO()
    make['noise'](0, 40).save(one, 'PNG'); make['noise'](1, 40).save(two, 'PNG')
    path = write_warc(tmp_path/name, [('image/png', '200 OK', one.getvalue(), 'a/1.png'), ('text/html', '200 OK', b'<p>x<img src="1.png#top"><img src="/2.png?v=1"><img src="//example.org/3.png"><img src=page.html>'
                                      b'<img src="http://example.com/1.png"><img src="http://127.0.0.1/1.png">', 'a/page.html'),
                                      ('image/png', '404 Not Found', one.getvalue(), '3.png'), ('application/octet-stream', '200 OK', two.getvalue(), '2.png?v=1')])
    page, = Pages(path)
    assert [read_image(page, src) for src in page.images[:2]] == [one.getvalue(), two.getvalue()]
    for src in page.images[2:]:
        with pytest.raises(ValueError, match='an address, not a file'): read_image(page, src)
    with open(path, 'r+b') as file: file.truncate(path.stat().st_size - 60)       # the last image is cut off: what is before it stays
    page, = Pages(path)
    assert [image is not None for image in page_images(page, 16)] == [True] + [False] * 5 and page.counts['image: truncated or damaged'] == 1


def test_a_split_shares_no_page():
    rng = np.random.default_rng(0)
    texts = [' '.join(map(str, rng.integers(0, 5000, 120))) for _ in range(300)]
    texts += [' '.join(text.split()[:-2]) for text in texts[:100]] + [text.upper() for text in texts[100:150]] + ['', 'short', 'Short!']
    groups = near_groups(texts)
    assert groups[:300] == list(range(300)) and groups[300:450] == list(range(150)) and groups[450:] == [450, 451, 451]
    sides = split_pages(texts, 0.3)
    test, train = ({groups[i] for i, side in enumerate(sides) if side == name} for name in ('test', 'train'))
    assert not test & train and 60 < len(test) < 130 and sides.count('test') == len(test)
    assert sides == split_pages(texts, 0.3) != split_pages(texts, 0.3, seed=1)
    assert {groups[i] for i, side in enumerate(sides) if side is None} <= test
    with pytest.raises(BadInput, match='no share|not a share'): split_pages(texts, 1.5)


def test_pages_are_kept_in_a_file(folder, tmp_path):
    page, = Pages(folder)
    page = write_codes(page, [range(4)] * 2 + [None] * 6)
    back, = load_pages(save_pages([page], tmp_path/'pages.jsonl'))
    assert (back.name, back.html, back.text, back.images, back.counts) == (page.name, page.html, page.text, ['0 1 2 3'] * 2, page.counts)
    for line in ('', '[]', '{"name": 1}', '{"name": "a", "html": 3, "counts": 7}', '\ud800'.encode('utf-8', 'surrogatepass').decode('latin-1'), '[' * 10**5):
        (tmp_path/'wrong.jsonl').write_text(f'{{"name": "a", "html": "<p>x"}}\n{line}\n', encoding='utf-8')
        with pytest.raises(BadInput, match='line 2, holds no page'): list(load_pages(tmp_path/'wrong.jsonl'))
    with pytest.raises(BadInput, match='is no file'): list(load_pages(tmp_path))


def test_without_warcio_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'warcio.archiveiterator', None)
    (tmp_path/'a.warc').write_bytes(b'')
    with pytest.raises(BadInput, match='pip install warcio'): list(Pages(tmp_path/'a.warc'))


def test_of_a_huge_file_only_the_beginning_is_read(tmp_path):
    with open(tmp_path/'a.html', 'wb') as file: file.truncate(2**33)  # a hole: it takes no room on the disk
    pages, before = Pages(tmp_path), memory('VmRSS')
    assert list(pages) == [] and pages.skipped == {'over 16 MB': 1} and not memory('VmRSS') - before > 100


def test_a_corpus_is_written_whole_or_not_at_all(tmp_path, vq, monkeypatch):
    coded = [minimal_page(f'<p>page {i} <img src="{" ".join(map(str, range(16)))}">', f'{i}.html') for i in range(3)]
    made = save_corpus(tmp_path/'new'/'corpus', coded[:2], coded[2:], vq, 16, 7, ['pages of mine'])
    assert json.loads((made/'corpus.json').read_text()) == dict(image_tokenizer=vq.fingerprint, codes=16, grid=[4, 4], px=16, seed=7, sources=['pages of mine'], pages=dict(train=2, test=1))
    assert [[page.html for page in load_pages(made/f'{side}.jsonl')] for side in ('train', 'test')] == [[page.html for page in its] for its in (coded[:2], coded[2:])]
    for wrong in ('1 2 3', ' '.join(['16'] * 16), 'a.png', ' '.join(['x'] * 16)):
        with pytest.raises(BadInput, match='b.html has an image that is not 4 x 4 codes below 16'): save_corpus(tmp_path/'c', coded, [minimal_page(f'<p>x<img src="{wrong}">', 'b.html')], vq, 16, 0)
    with pytest.raises(BadInput, match='the test side has no page'): save_corpus(tmp_path/'c', coded, [], vq, 16, 0)
    with pytest.raises(BadInput, match='not an empty folder'): save_corpus(made, coded, coded, vq, 16, 0)
    def full(path, content): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(module, 'write_atomic', full)
    with pytest.raises(BadInput, match='No space left'): save_corpus(tmp_path/'c', coded, coded, vq, 16, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['new'] and len(list(made.iterdir())) == 3


def write_site(folder, make, pages=20):
    folder.mkdir()
    for i in range(3): make['noise'](i, 40).save(folder/f'{i}.png')
    (folder/'broken.png').write_bytes(b'no image'); (folder/'3.png').write_bytes((folder/'2.png').read_bytes())
    for i in range(pages): (folder/f'{i:02}.html').write_text(f'<nav>menu</nav><p>The page of the number {i} and of the word {"abcdefghijklmnopqrstuvwxyz"[i] * 5}: <img alt=A src="{i % 6}.png">')
    (folder/'none.html').write_text('<script>x</script>'); (folder/'copy.html').write_text((folder/'00.html').read_text()); (folder/'text.html').write_text('<p>Words only.<img src=broken.png>')
    return folder


def test_pages_makes_a_corpus(tmp_path, vq_folder, vq, make, t2i, capsys):
    site, tiny = write_site(tmp_path/'site', make), ['--px', 16, '--image-tokenizer', vq_folder, '--test', .3]
    assert t2i('pages', site, tmp_path/'out', *tiny, '--drop', '//nav', '--json') == 0
    out, words = capsys.readouterr()
    made, about = json.loads(out), json.loads((tmp_path/'out'/'corpus.json').read_text())
    sides = {side: list(load_pages(tmp_path/'out'/f'{side}.jsonl')) for side in ('train', 'test')}
    images = sum(1 for i in [*range(20), 0] if i % 6 < 4)
    assert (made['documents'], made['images'], made['with_images'], made['unique_images'], made['image_tokens']) == (22, images, images, 3, 16 * images)
    assert made['skipped'] == {'no text': 1} and made['lost'] == {'no file': 21 - images, 'not an image': 1} and made['tokens'] == made['image_tokens'] + made['text_tokens'] > made['image_tokens']
    assert len(sides['train']) + len(sides['test']) + made['copies'] == 22 and (len(sides['train']), len(sides['test'])) == (made['train'], made['test']) and 2 <= made['test'] <= 12
    assert about['image_tokenizer'] == vq.fingerprint and about['sources'] == ['site'] and 'menu' not in ''.join(page.html for its in sides.values() for page in its)
    assert '22/22' not in words and '23/23' in words and 'pages left out: 1 no text' in words and re.search(r'images left out: .*1 not an image', words)
    assert re.search(r'Documents +Size \(MB\) +Unique images +Tokens\n +22 +0\.\d\d +3 +[\d,]+\n', words) and f'(train {made["train"]}, test {made["test"]}' in words
    again = make_corpus(site, tmp_path/'again', 16, str(vq_folder), .3, '//nav')
    assert {k: v for k, v in again.items() if k != 'folder'} == {k: v for k, v in made.items() if k != 'folder'}
    assert all((tmp_path/'out'/name).read_bytes() == (tmp_path/'again'/name).read_bytes() for name in ('train.jsonl', 'test.jsonl', 'corpus.json'))
    write_warc(tmp_path/'a.warc.gz', [('text/html', '200 OK', p.read_bytes(), p.name) for p in site.glob('*.html')] + [('image/png', '200 OK', p.read_bytes(), p.name) for p in site.glob('*.png')])
    assert t2i('pages', tmp_path/'a.warc.gz', tmp_path/'crawl', *tiny, '--drop', '//nav', '--json') == 0
    crawl = json.loads(capsys.readouterr().out)
    assert [crawl[k] for k in ('documents', 'images', 'unique_images', 'skipped')] == [made[k] for k in ('documents', 'images', 'unique_images', 'skipped')]


@pytest.mark.parametrize(('arguments', 'says'), [
    (['gone', 'out'], "source 'gone' does not exist"), (['none', 'out'], 'has no HTML file'), (['empty', 'out'], "has no page to keep (1 no text); give pages with text"), (['site', 'full'], 'not an empty folder'),
    (['site', 'out', '--test', '1'], 'test=1.0 is no share'), (['site', 'out', '--test', '0'], 'the test side has no page'), (['site', 'out', '--px', '17'], 'px=17'), (['site', 'out', '--drop', '//['], "drop='//[' is no XPath"),
    (['site', 'out', '--image-tokenizer', './none'], "image_tokenizer='./none'"), (['site/text.html', 'out'], 'the test side has no page'), (['site'], 't2i pages lacks OUT')])
def test_pages_says_what_is_wrong_in_one_sentence(arguments, says, tmp_path, make, t2i, monkeypatch, capsys):
    write_site(tmp_path/'site', make, 4); (tmp_path/'none').mkdir(); (tmp_path/'empty').mkdir(); (tmp_path/'empty'/'a.html').write_text('<script>x</script>'); (tmp_path/'full').mkdir(); (tmp_path/'full'/'a').write_text('')
    monkeypatch.chdir(tmp_path)
    assert t2i('pages', *arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith('t2i: ') and says in last and not (tmp_path/'out').exists()


def test_the_sample_that_ships():
    about, sides = json.loads((data_path('gimp_help_sample')/'corpus.json').read_text()), {side: data_path('gimp_help_sample', f'{side}.jsonl') for side in ('train', 'test')}
    pages = {side: list(load_pages(path)) for side, path in sides.items()}
    assert about['pages'] == {side: len(its) for side, its in pages.items()} == dict(train=60, test=15) and sum(path.stat().st_size for path in sides.values()) < 130_000
    from t2ianalysis.tokenizers import load_image_tokenizer
    assert about['image_tokenizer'] == load_image_tokenizer('bundled').fingerprint and all(page.images for its in pages.values() for page in its)
    assert {len(src.split()) for its in pages.values() for page in its for src in page.images} == {64} and len(set(near_groups([page.text for its in pages.values() for page in its]))) == 75
    assert [json.loads(line)['html'] for path in sides.values() for line in path.open(encoding='utf-8')] == [page.html for its in pages.values() for page in its]
    assert 'GNU Free Documentation License' in (data_path('gimp_help_sample')/'LICENSE').read_text()
