"""Token ids against an independent BPE and against recorded ids."""

import itertools
import json
import pathlib
import re
import sysconfig

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from adaptax.experiments.data import ByteTokenizer, load_tokenizer
from adaptax.experiments.weights import gguf

# Ids that transformers 5.24 gives for the vocabulary of the same file.
_RECORDED = {
  "The capital of France is": [504, 3575, 282, 4649, 314],
  "def f(x):\n    return x*12345\n": [
    *(1604, 275, 24, 104, 727, 472, 1003, 1792, 26),
    *(33, 34, 35, 36, 37, 198),
  ],
  "naïve café — 東京 🙂": [
    *(3546, 46494, 37366, 1841, 17097, 247, 126, 16736, 122, 47526),
  ],
  "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
  "It's 2026, isn't it?": [
    *(1589, 506, 216, 34, 32, 34, 38, 28, 3247, 982, 357, 47),
  ],
}

# Neither control characters nor halves of surrogate pairs.
_CHARACTERS = st.characters(
  min_codepoint=32, max_codepoint=0xFFFF, exclude_categories=["Cs"]
)


@pytest.fixture(scope="module")
def smollm2_path():
  try:
    return gguf.smollm2_path()
  except FileNotFoundError as error:
    pytest.skip(str(error))


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
  return load_tokenizer("model", smollm2_path)


class ReferenceBPE:
  """Byte-level BPE of ASCII text in plain Python, digits one by one."""

  _WORDS = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+"
    r"|\s+(?!\S)|\s+"
  )

  def __init__(self, path):
    metadata = gguf.read_gguf(path).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = metadata["tokenizer.ggml.merges"]
    self.ids = {token: i for i, token in enumerate(tokens)}
    self.ranks = {tuple(pair.split()): i for i, pair in enumerate(merges)}
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    self.letters = {byte: chr(byte) for byte in visible}
    self.letters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}

  def encode(self, text):
    ids = []
    for part in re.split(r"([0-9])", text):
      for word in self._WORDS.findall(part):
        ids += [self.ids[token] for token in self._merge(word)]
    return ids

  def _merge(self, word):
    tokens = [self.letters[byte] for byte in word.encode()]
    while len(tokens) > 1:
      pairs = list(itertools.pairwise(tokens))
      best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ids)))
      if best not in self.ranks:
        break
      at = pairs.index(best)
      tokens[at : at + 2] = ["".join(best)]
    return tokens


@pytest.fixture(scope="module")
def reference(smollm2_path):
  return ReferenceBPE(smollm2_path)


class TestSmolLM2:
  @pytest.mark.parametrize("text", _RECORDED)
  def test_ids_are_the_recorded_ones(self, smollm2, text):
    assert smollm2.encode(text).tolist() == _RECORDED[text]

  def test_ids_equal_plain_bpe_on_code(self, smollm2, reference):
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    text = (library / "bisect.py").read_text("ascii")
    assert smollm2.encode(text).tolist() == reference.encode(text)

  @given(st.text("abAB .,'s01(\n\t", max_size=40))
  def test_ids_equal_plain_bpe(self, smollm2, reference, text):
    assert smollm2.encode(text).tolist() == reference.encode(text)

  @given(st.text(_CHARACTERS))
  def test_text_survives(self, smollm2, text):
    assert smollm2.decode(smollm2.encode(text)) == text

  def test_specials_frame_documents_and_leave_no_text(self, smollm2):
    ids = smollm2.encode("<|im_start|>Hi<|im_end|>").tolist()
    assert (ids[0], ids[-1]) == (1, 2)
    assert smollm2.decode(ids) == "Hi"
    assert (smollm2.bos_id, smollm2.eos_id) == (None, 2)
    assert smollm2.vocab_size == 49152

  def test_a_batch_equals_its_texts(self, smollm2):
    batch = smollm2.encode_batch(list(_RECORDED))
    assert [ids.tolist() for ids in batch] == list(_RECORDED.values())

  def test_bytes_that_the_vocabulary_lacks_are_dropped(self, smollm2):
    assert smollm2.decode(smollm2.encode("a\x04b")) == "ab"


class TestByteTokenizer:
  @given(st.text(_CHARACTERS))
  def test_text_survives(self, text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    framed = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert tokenizer.decode(framed) == text
    assert max(framed) < tokenizer.vocab_size


def _save(folder, *, bos=True, **configs):
  """A byte-level tokenizer.json that truncates, with specials <s> and </s>."""
  letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  vocabulary = {letter: i for i, letter in enumerate(sorted(letters))}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(["<s>", "</s>"])
  if bos:
    backend.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 256)]
    )
  backend.enable_truncation(4)
  backend.save(str(folder / "tokenizer.json"))
  for name, config in configs.items():
    (folder / f"{name}.json").write_text(json.dumps(config))
  return folder


class TestTokenizerJson:
  @pytest.mark.parametrize(
    ("configs", "eos_id"),
    [
      ({}, None),
      ({"tokenizer_config": {"eos_token": "</s>"}}, 257),
      ({"tokenizer_config": {"eos_token": {"content": "</s>"}}}, 257),
      ({"config": {"eos_token_id": [257, 7]}}, 257),
      ({"config": {"eos_token_id": 257}}, 257),
    ],
  )
  def test_the_end_token_is_found(self, tmp_path, configs, eos_id):
    _save(tmp_path, **configs)
    assert load_tokenizer(str(tmp_path)).eos_id == eos_id

  @pytest.mark.parametrize(("bos", "bos_id"), [(True, 256), (False, None)])
  def test_the_begin_token_is_the_post_processors(self, tmp_path, bos, bos_id):
    tokenizer = load_tokenizer("model", _save(tmp_path, bos=bos))
    assert tokenizer.bos_id == bos_id

  def test_a_stored_truncation_cuts_nothing(self, tmp_path):
    tokenizer = load_tokenizer(str(_save(tmp_path) / "tokenizer.json"))
    text = "much longer than four tokens"
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text

  def test_fingerprints_tell_files_apart(self, tmp_path):
    prints = []
    for name, bos in (("a", True), ("b", True), ("c", False)):
      (tmp_path / name).mkdir()
      folder = _save(tmp_path / name, bos=bos)
      prints.append(load_tokenizer(str(folder)).fingerprint)
    assert prints[0] == prints[1] != prints[2]


class TestErrors:
  def test_model_without_a_model(self):
    with pytest.raises(ValueError, match="needs a pretrained model"):
      load_tokenizer("model")

  def test_a_missing_path_lists_the_choices(self, tmp_path):
    with pytest.raises(FileNotFoundError, match="'bytes', 'model', or"):
      load_tokenizer(str(tmp_path / "none"))

  def test_a_malformed_file_is_named(self, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": 3')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a"):
      load_tokenizer(str(path))

  def test_a_malformed_config_is_named(self, tmp_path):
    folder = _save(tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"_config\.json is malformed: Exp"):
      load_tokenizer(str(folder))

  def test_a_gguf_of_another_family_is_refused(self, tmp_path, monkeypatch):
    metadata = {
      "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.pre": "qwen2",
    }
    monkeypatch.setattr(gguf, "read_gguf", lambda _: gguf.GGUF(metadata, {}))
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(ValueError, match="'qwen2'"):
      load_tokenizer(str(path))
