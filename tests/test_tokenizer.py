# ruff: noqa: RUF001, SIM905 - ambiguous characters are the point; lists of words read best as text
from __future__ import annotations

import gzip
import html
import json
import pickle
import random
import string
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors

from clipkit.errors import UserError
from clipkit.tokenizer import Cleaning, TextContract, Tokenizer, clean_text
from clipkit.tokenizer_training import clip_definition, train_tokenizer

PEERS = "the extra `peers` is not installed"
CAPTIONS = ["a red circle on a white background", "a small blue circle", "two red squares"]
LITERAL = "a <end_of_text> sign"


@pytest.fixture(scope="module")
def english() -> Tokenizer:
    return Tokenizer()


def nasty_captions(count: int, *, seed: int = 0) -> list[str]:
    """Pieces of broken and foreign text, joined at random; the same on every version of Python."""
    rng = random.Random(seed)
    old = unicodedata.ucd_3_2_0  # what every table of Unicode knows
    known = [chr(c) for c in range(0x30000) if old.category(chr(c)) not in ("Cn", "Cs")]
    fragments = [
        *"Don't IT'S we'RE they'VE I'M she'LL he'D 'S''s 'ſ it'ſ ’s ‘Tis rock'n'roll".split(),
        *"İstanbul ΟΔΟΣ ὈΔΥΣΣΕΎΣ Σ ſtraße STRASSE ẞ ŉ ǰ Ⅷ ⅷ K Å Å ﬃ ﬁsh Ⓐ DŽ Dž".split(),
        *"123 3.14 1,000 ١٢٣ १२३ ½ ² ① 2D 4K x86_64 1st 20°C $5 € %20 -_- … — ¯\\_(ツ)_/¯".split(),
        *"привет мир שלום مرحبا नमस्ते 你好，世界 こんにちは ｶﾀｶﾅ ＦＵＬＬ 안녕 ไทย ትግርኛ".split(),
        *"é e\u0301 n\u0303 a\u0300\u0323 Ǡ 각 \u1100\u1161\u11a8 Z\u0338\u0322".split(),
        *"👍 👍🏽 🏴\u200d☠\ufe0f 👩\u200d👧\u200d👦 🇩🇪 ❤\ufe0f 1\ufe0f\u20e3 \U000e007f".split(),
        *"&amp; &lt;b&gt; &amp;amp; &amp;lt;i&amp;gt; &eacute; &EACUTE; &#39; &#x1F600;".split(),
        *"&nbsp; &amp;#39;s &notit; &copy &; &#; &#0; &#150; &#xD800; AT&T R&D &frac12;".split(),
        *"schÃ¶n cafÃ© â€œquotedâ€\x9d itâ€™s Ã¢â‚¬â„¢ naÃ¯ve ðŸ˜\x8d Ð¿Ñ€Ð¸Ð² l\x92été".split(),
        *"<start_of_text> <end_of_text> <|endoftext|> <START_OF_TEXT> a<end_of_text>b".split(),
        *"</w> w</w> <br/> {} ``a'' ((( ))) !!! ... @user #tag https://a.b/c?d=e&f=g _a_b_".split(),
        *["\u200b", "\u200d", "\ufeff", "\u00ad", "\u2060", "\u202e", "\u180e", "\ufffd", "\xa0"],
        *["\t", "\n", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2003", "\u2028", "\u3000", "", "   "],
        *["\x00", "\x01", "\x1b[31m", "\x1b", "\x7f", "\x80", "\x9f", "\ud83d\ude00", "\ud800"],
    ]

    def piece() -> str:
        kind = rng.random()
        if kind < 0.55:
            return rng.choice(fragments)
        if kind < 0.7:
            return "".join(rng.choices(known, k=rng.randint(1, 6)))
        if kind < 0.8:
            return "".join(rng.choices(string.printable, k=rng.randint(1, 12)))
        word = rng.choice(["photo", "Café", "naïve façade", "it's", "Ελλάδα", "ΤΈΛΟΣ", "日本"])
        return rng.choice([str.upper, str.title, str.swapcase, html.escape, mojibake])(word)

    def caption() -> str:
        # One in ten is too long for 77 tokens.
        count = rng.randint(40, 120) if rng.random() < 0.1 else rng.randint(0, 8)
        return "".join(piece() + rng.choice(["", " ", " ", "  "]) for _ in range(count))

    return [caption() for _ in range(count)]


def mojibake(text: str) -> str:
    return text.encode().decode("cp1252", "replace")


def peer(merges: Sequence[Sequence[str]], folder: Path, clean: str = "lower") -> Any:
    """open_clip's tokenizer over these merges."""
    open_clip = pytest.importorskip("open_clip", reason=PEERS)
    path = folder / "merges.txt.gz"
    lines = ["version", *(" ".join(merge) for merge in merges)]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return open_clip.tokenizer.SimpleTokenizer(str(path), clean=clean)


def merges_of(vocabulary: str) -> list[tuple[str, str]]:
    if vocabulary == "english":
        merges = json.loads(Tokenizer().definition)["model"]["merges"]
    else:
        open_clip = pytest.importorskip("open_clip", reason=PEERS)
        with gzip.open(open_clip.tokenizer.default_bpe(), "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
        merges = [line.split() for line in lines[1 : 49_408 - 512 - 2 + 1]]
    return [(left, right) for left, right in merges]


@pytest.mark.parametrize(
    ("vocabulary", "clean"),
    [("clip", "lower"), ("english", "lower"), ("clip", "whitespace"), ("clip", "canonicalize")],
)
def test_ids_are_those_of_open_clip(vocabulary: str, clean: Cleaning, tmp_path: Path) -> None:
    regex = pytest.importorskip("regex", reason=PEERS)
    merges = merges_of(vocabulary)
    theirs = peer(merges, tmp_path, clean)
    ours = Tokenizer(definition=clip_definition(merges), clean=clean, pad_to_context=True)
    assert ours.vocab_size == theirs.vocab_size == 512 + len(merges) + 2
    assert [ours.contract.start_id, ours.contract.end_id] == theirs.all_special_ids

    captions = nasty_captions(1000)
    got, expected = ours(captions), theirs(captions)
    differing = [captions[row] for row in (got != expected).any(dim=1).nonzero().flatten()]
    words = "<start_of_text>", "<end_of_text>"
    # The first deliberate difference, and no other.
    assert all(any(word in caption.lower() for word in words) for caption in differing)
    theirs.cache.clear()
    theirs.pat = regex.compile(theirs.pat.pattern.removeprefix("|".join(words) + "|"), regex.I)
    assert torch.equal(got, theirs(captions))


def test_deliberate_differences_from_open_clip(english: Tokenizer, tmp_path: Path) -> None:
    theirs = peer(merges_of("english"), tmp_path)
    end = english.contract.end_id
    assert theirs([LITERAL])[0].tolist().count(end) == 2
    assert english([LITERAL])[0].tolist().count(end) == 1
    assert english.decode(english([LITERAL])[0]) == "a < end _ of _ text > sign"

    iota = "a \u0345 b"
    assert theirs.decode(theirs.encode(iota)) == "a b "
    assert english.decode(english([iota])[0]) == iota

    # U+323B0 is a letter since Unicode 17: it may or may not be cut from the one before it.
    new = "\u4e2d\U000323b0"
    assert english.decode(english([new])[0]).replace(" ", "") == new


@pytest.mark.parametrize("how", ["lower", "whitespace", "canonicalize"])
def test_cleaning_is_that_of_open_clip(how: Cleaning) -> None:
    open_clip = pytest.importorskip("open_clip", reason=PEERS)
    reference = open_clip.tokenizer.get_clean_fn(how)
    for caption in nasty_captions(500, seed=1):
        assert clean_text(caption, how) == reference(caption)


def test_ftfy_leaves_printable_ascii_without_entities_alone() -> None:
    ftfy = pytest.importorskip("ftfy")
    rng = random.Random(0)
    characters = [chr(code) for code in range(0x20, 0x7F) if chr(code) != "&"]
    words = ["<b>", "</w>", "it's", "[31m", "%C3%A9", "\\u00e9", "=?utf-8?", "??", ",,", "``", "x;"]
    for _ in range(2000):
        text = "".join(rng.choices(characters + words, k=rng.randint(0, 40)))
        assert html.unescape(html.unescape(ftfy.fix_text(text))) == text


def test_cleaning() -> None:
    text = " A_Photo of  caf&amp;eacute;,\tMÃ¼nchen! "
    assert clean_text(text, "lower") == "a_photo of café, münchen!"
    assert clean_text(text, "whitespace") == "A_Photo of café, München!"
    assert clean_text(text, "canonicalize") == "a photo of café münchen"
    assert clean_text(text, "none") == text
    assert clean_text("a \ud83d\ude00 \ud800", "none") == "a 😀 \ufffd"


def test_ftfy_is_not_needed_without_cleaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    tokenizer = Tokenizer(clean="none")
    assert tokenizer.decode(tokenizer(["café"])[0]) == "café"


def test_every_byte_is_reachable() -> None:
    tokenizer = Tokenizer(definition=train_tokenizer(CAPTIONS, vocab_size=600), clean="none")
    symbols = json.loads(tokenizer.definition)["model"]["vocab"]
    assert list(symbols.values()) == list(range(len(symbols)))
    assert len(list(symbols)[:512]) == 512
    codes = [c for c in range(1, 0x110000, 997) if not 0xD800 <= c < 0xE000] + list(range(1, 0x800))
    texts = [chr(code) for code in codes if not chr(code).isspace()]
    used = {byte for text in texts for byte in text.encode()}
    assert used >= set(range(0x21, 0xF5)) - {0xC0, 0xC1}
    for text, row in zip(texts, tokenizer(texts), strict=True):
        assert tokenizer.decode(row) == text
        assert row[-1] in (tokenizer.contract.end_id, tokenizer.contract.pad_id)


def test_decode_gives_the_cleaned_caption_back(english: Tokenizer) -> None:
    captions = ["A photo of a cat", "Ελλάδα 🎉 emoji", "naïve façade"]
    tokens = english(captions)
    assert [english.decode(row) for row in tokens] == [c.lower() for c in captions]
    assert english.decode(tokens[0].tolist()[1:3]) == "a photo"


def test_shapes_padding_and_truncation(english: Tokenizer) -> None:
    start, end = english.contract.start_id, english.contract.end_id
    assert english([""]).tolist() == [[start, end]]
    assert english([]).shape == (0, 0)
    assert english("one caption").shape[0] == 1

    short = Tokenizer(context_length=5)
    tokens, truncated = short.encode(["cat", "cat cat cat", "cat cat cat cat", ""])
    cat = english(["cat"])[0, 1].item()
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [
        [start, cat, end, 0, 0],
        [start, cat, cat, cat, end],
        [start, cat, cat, cat, end],
        [start, end, 0, 0, 0],
    ]
    assert truncated.tolist() == [False, False, True, False]
    assert short(["cat"]).shape == (1, 3)
    assert Tokenizer(context_length=9, pad_to_context=True)(["cat"]).shape == (1, 9)


def test_contract(english: Tokenizer) -> None:
    assert english.contract == TextContract(16_384, 77, 16_382, 16_383, 0, False, "lower")
    assert english.vocab_size == 16_384
    assert english.context_length == 77


def test_english_vocabulary_suits_captions(english: Tokenizer) -> None:
    assert len(english.definition.encode()) < 700_000
    words = """photo picture emoji drawing cartoon red green blue yellow orange purple turquoise
        circle square triangle star hexagon dog cat horse elephant giraffe zebra penguin butterfly
        apple banana pineapple carrot yogurt pizza grinning skateboard laptop umbrella left
        background""".split()
    assert english(words).shape == (len(words), 3)


def test_pickle_and_carried_rebuild_the_same_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(train_tokenizer(CAPTIONS, vocab_size=600), encoding="utf-8")
    tokenizer = Tokenizer(str(path))
    path.unlink()
    copies = pickle.loads(pickle.dumps(tokenizer)), Tokenizer(**tokenizer.carried())
    captions = [*nasty_captions(50), LITERAL]
    for copy in copies:
        assert torch.equal(copy(captions), tokenizer(captions))
        assert copy.contract == tokenizer.contract
        assert (copy.name, copy.digest) == (str(path), tokenizer.digest)


def test_training_needs_few_captions_and_ignores_their_order() -> None:
    definition = train_tokenizer(CAPTIONS, vocab_size=600)
    assert definition == train_tokenizer(reversed(CAPTIONS), vocab_size=600)
    tokenizer = Tokenizer(definition=definition)
    assert 514 < tokenizer.vocab_size <= 600
    assert tokenizer(["red circle"]).shape == (1, 4)  # seen twice each: one token each
    # A tie between pairs, many times over, does not depend on the order of a hash table.
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(2000)]
    first, second = (train_tokenizer(words, vocab_size=900) for _ in range(2))
    assert first == second
    assert Tokenizer(definition=first).vocab_size == 900


def test_training_refuses_a_vocabulary_without_a_merge() -> None:
    with pytest.raises(UserError, match="vocab_size is 514"):
        train_tokenizer(CAPTIONS, vocab_size=514)


def test_every_merge_makes_its_own_symbol() -> None:
    model = json.loads(train_tokenizer(["abc abc ab bc xabc xbc " * 9], vocab_size=600))["model"]
    made = [left + right for left, right in model["merges"]]
    assert len(set(made)) == len(made)
    assert len(model["vocab"]) == 512 + len(made)


def word_piece() -> Library:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "photo", "##s", "of", "[", "]", "sep"]
    vocab = {word: id for id, word in enumerate(words)}
    library = Library(models.WordPiece(vocab, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    library.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return library


def unigram(template: str = "$A </s>") -> Library:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁photo", -2.0)]
    library = Library(models.Unigram(pieces, unk_id=2))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["<pad>", "</s>", "<unk>"])
    if template:
        specials = [("</s>", 1)]
        library.post_processor = processors.TemplateProcessing(template, None, specials)
    return library


def test_word_piece_of_others(tmp_path: Path) -> None:
    library = word_piece()
    library.enable_truncation(3)  # as files of sentence encoders come; ours is the one that counts
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(str(tmp_path), context_length=6)
    assert tokenizer.contract == TextContract(12, 6, 2, 3, 0, False, "lower")
    tokens, truncated = tokenizer.encode(["a photo", "red photos of a red photo", "[SEP]", ""])
    assert tokens.tolist() == [
        [2, 4, 6, 3, 0, 0],
        [2, 5, 6, 7, 8, 3],
        [2, 9, 11, 10, 3, 0],
        [2, 3, 0, 0, 0, 0],
    ]
    assert truncated.tolist() == [False, True, False, False]


def test_tokenizer_without_a_start_token(tmp_path: Path) -> None:
    unigram().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(str(tmp_path / "tokenizer.json"), context_length=3)
    assert tokenizer.contract == TextContract(5, 3, None, 1, 0, False, "lower")
    assert tokenizer(["a photo a", "a"]).tolist() == [[3, 4, 1], [3, 1, 0]]
    assert tokenizer.decode([3, 4, 1, 0]) == "a photo"


@pytest.mark.parametrize("beside", ["tokenizer_config.json", "special_tokens_map.json", ""])
def test_padding_with_the_end_token_as_clip_of_the_hub(beside: str, tmp_path: Path) -> None:
    definition = json.loads(clip_definition([]))
    definition["padding"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    if beside:
        pad = {"content": "<end_of_text>", "lstrip": False}
        (tmp_path / beside).write_text(json.dumps({"pad_token": pad}), encoding="utf-8")
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.contract.pad_id == tokenizer.contract.end_id == 513
    assert tokenizer(["ab", ""])[1].tolist() == [512, 513, 513, 513]
    assert Tokenizer(**tokenizer.carried()).contract == tokenizer.contract
    assert Tokenizer(definition=json.dumps(definition)).contract == tokenizer.contract


@pytest.mark.parametrize("template", ["", "</s> $A"])
def test_tokenizer_without_an_end_token_is_refused(template: str, tmp_path: Path) -> None:
    unigram(template).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"model.tokenizer.path .* no end token"):
        Tokenizer(str(tmp_path))


def test_tokenizer_without_an_unknown_token_is_refused(tmp_path: Path) -> None:
    Library(models.WordLevel({"photo": 0})).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"model.tokenizer.path .* fails on plain text"):
        Tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"padding": {}}'])
def test_broken_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"model.tokenizer.path"):
        Tokenizer(str(tmp_path))


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.tokenizer.path .* no tokenizer.json"):
        Tokenizer(str(tmp_path))
    for path in (str(tmp_path / "missing.json"), "missing.json", "a/b/c", "", "~/no such"):
        with pytest.raises(UserError, match=r"model.tokenizer.path .* no such file"):
            Tokenizer(path)
    with pytest.raises(UserError, match=r"model.tokenizer.context_length is 2"):
        Tokenizer(context_length=2)
    with pytest.raises(UserError, match=r"model.tokenizer.clean is 'upper'"):
        Tokenizer(clean="upper")  # type: ignore[arg-type]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline hub with an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_hub_id_from_the_cache(hub_cache: Path) -> None:
    repo, commit = hub_cache / "models--someone--clip", 40 * "a"
    for folder in (repo / "snapshots" / commit, repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    word_piece().save(str(repo / "snapshots" / commit / "tokenizer.json"))
    (repo / "snapshots" / commit / "tokenizer_config.json").write_text('{"pad_token": "[UNK]"}')
    tokenizer = Tokenizer("someone/clip", fallback="english")
    assert tokenizer.name == "someone/clip"
    assert tokenizer.contract.pad_id == 1


@pytest.mark.usefixtures("hub_cache")
def test_hub_id_that_cannot_be_read(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"model.tokenizer.path is 'some/one'.* the hub cannot"):
        Tokenizer("some/one")
    with caplog.at_level("INFO", logger="clipkit"):
        assert Tokenizer("some/one", fallback="english").name == "english"
    (record,) = [r for r in caplog.records if r.name.startswith("clipkit")]
    assert record.getMessage().startswith("tokenizer: english stands in for some/one")
    with pytest.raises(UserError, match="some/two"):
        Tokenizer("some/one", fallback="some/two")
