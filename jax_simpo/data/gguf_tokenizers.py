"""Makes the tokenizer that the metadata of a GGUF file describe, with its special tokens and chat template.

A GGUF file holds a vocabulary and how its pieces merge. How a text is split before pieces are merged is only a name,
`tokenizer.ggml.pre`, whose meaning is in llama.cpp (`llama-vocab.cpp`). A name without an entry here is refused: with
another split most texts get the same tokens, and some do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_simpo.data.transformers_import import import_transformers
from jax_simpo.errors import DataError
from jax_simpo.gguf_files import GgufFile, open_gguf

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# `tokenizer.ggml.token_type`
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_SPACE = "▁"  # SentencePiece's sign for a space

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Split:
    """Describes how a text is split before its pieces are merged.

    Attributes:
        pattern: the pieces; None takes GPT-2's.
        single_digits: each digit is a piece of its own first.
        whole_words: a piece that is in the vocabulary is taken whole, whatever the merges (`ignore_merges`).
        begins_with_bos: the tokenizer puts the first token before a text where the file does not say so.
        composed: the text is brought to Unicode's form NFC first.
    """

    pattern: str | None = None
    single_digits: bool = False
    whole_words: bool = False
    begins_with_bos: bool = False
    composed: bool = False


_LLAMA3_SPLIT = _Split(_LLAMA3, whole_words=True, begins_with_bos=True)
_QWEN2_SPLIT = _Split(_QWEN2, composed=True)
_SPLITS = {
    "gpt-2": _Split(),
    "smollm": _Split(single_digits=True),
    "starcoder": _Split(single_digits=True),
    "refact": _Split(single_digits=True),
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "tekken": _Split(_TEKKEN, whole_words=True, begins_with_bos=True),
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
}


def make_gguf_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Makes the tokenizer of a GGUF file.

    Raises:
        DataError: the file describes no tokenizer, or one of a kind that is not built in.
        ModelError: the file cannot be read.
    """
    file = open_gguf(path)
    kind, tokens, types = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "tokens", "token_type"))
    if not tokens or types is None or len(types) != len(tokens):
        raise DataError(f"{path}: has no `tokenizer.ggml.tokens` with a `tokenizer.ggml.token_type` each; {_ADVICE}")
    # llama.cpp fills the vocabulary up to the rows of the embedding with [PAD1], [PAD2], ...
    last = max((id for id, of_type in enumerate(types) if of_type != _UNUSED), default=-1)
    tokens, types = tokens[: last + 1], types[: last + 1]
    if kind not in ("gpt2", "llama"):
        raise DataError(
            f"{path}: tokenizer.ggml.model={kind!r} is not supported; supported are gpt2 and llama; {_ADVICE}"
        )
    try:
        made, tokens = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens, types)
    except DataError:
        raise
    except Exception as error:  # the library has no type of its own
        raise DataError(f"{path}: its tokenizer cannot be built ({error}); {_ADVICE}") from error
    return _with_special_tokens(file, made, tokens, types)


_ADVICE = "set `tokenizer_name_or_path` to the folder or hub id of the model's own tokenizer"


def _byte_level(file: GgufFile, tokens: list[str]) -> tuple[Tokenizer, list[str]]:
    """Makes a byte-level BPE tokenizer, as those of GPT-2, Llama 3, Qwen and SmolLM are; returns its vocabulary too."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    split = _split_of(file)
    merges = file.metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise DataError(f"{file.path}: has no `tokenizer.ggml.merges`; {_ADVICE}")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split.whole_words))
    if split.composed:
        made.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.single_digits else []
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    return made, tokens


def _split_of(file: GgufFile) -> _Split:
    name = file.metadata.get("tokenizer.ggml.pre")
    if name not in _SPLITS:
        raise DataError(
            f"{file.path}: tokenizer.ggml.pre={name!r} is no way to split texts that is built in "
            f"({', '.join(_SPLITS)}); {_ADVICE}"
        )
    return _SPLITS[name]


def _sentencepiece(file: GgufFile, tokens: list[str], types: Sequence[int]) -> tuple[Tokenizer, list[str]]:
    """Makes the BPE tokenizer of a SentencePiece model, as those of Llama 2, Mistral and Gemma are.

    Returns:
        The tokenizer, and its vocabulary: pieces that users defined are found in the text as it was written, so theirs
        have spaces where the others have `▁`.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) < len(tokens):
        raise DataError(f"{file.path}: has no `tokenizer.ggml.scores` for its tokens; {_ADVICE}")
    tokens = [
        token.replace(_SPACE, " ") if of_type == _USER_DEFINED else token
        for token, of_type in zip(tokens, types, strict=True)
    ]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    unknown = next((token for token, of_type in zip(tokens, types, strict=True) if of_type == _UNKNOWN), None)
    model = models.BPE(
        vocabulary,
        _merges(vocabulary, types, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=_BYTE in types,
    )
    made = Tokenizer(model)
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made, tokens


def _merges(vocabulary: dict[str, int], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Returns the merges that lead to the pieces of a SentencePiece model, the best score first.

    SentencePiece merges the two neighbours whose union has the best score, so a piece that can be split in several ways
    has several merges of one rank.
    """
    merges = []
    for piece, id in vocabulary.items():
        if types[id] == _NORMAL:
            halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
            known = [(vocabulary[a], vocabulary[b]) for a, b in halves if a in vocabulary and b in vocabulary]
            merges += [(-scores[id], id, *pair) for pair in known if {types[part] for part in pair} == {_NORMAL}]
    pieces = {id: piece for piece, id in vocabulary.items()}
    return [(pieces[a], pieces[b]) for *_, a, b in sorted(merges)]


def _with_special_tokens(
    file: GgufFile, made: Tokenizer, tokens: Sequence[str], types: Sequence[int]
) -> PreTrainedTokenizerBase:
    """Adds the tokens that texts name as a whole, the chat template, and the tokens around a text."""
    from tokenizers import AddedToken, processors

    def token(name: str) -> str | None:
        id = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if id is not None and not 0 <= id < len(tokens):
            raise DataError(f"{file.path}: tokenizer.ggml.{name}_token_id={id}, but there are {len(tokens)} tokens")
        return None if id is None else tokens[id]

    special = {"bos_token": token("bos"), "eos_token": token("eos"), "unk_token": token("unknown")}
    special["pad_token"] = token("padding")
    whole = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}  # the type -> whether such a token is special
    added = [
        AddedToken(text, normalized=False, special=whole[of_type])
        for text, of_type in zip(tokens, types, strict=True)
        if of_type in whole
    ]
    made.add_special_tokens([token for token in added if token.special])
    made.add_tokens([token for token in added if not token.special])
    metadata, template = file.metadata, file.metadata.get("tokenizer.chat_template")
    sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    begins = metadata.get("tokenizer.ggml.add_bos_token", sentencepiece or _split_of(file).begins_with_bos)
    before = special["bos_token"] if begins else None
    # llama.cpp names a first token for every model. Qwen's tokenizer has none, and no text of its begins with it.
    if before is None and not any(part and part in (template or "") for part in ("bos_token", special["bos_token"])):
        special["bos_token"] = None
    after = special["eos_token"] if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if before or after:
        made.post_processor = processors.TemplateProcessing(
            single=[part for part in (before, "$A", after) if part],
            special_tokens=[(name, made.token_to_id(name)) for name in {before, after} if name],
        )
    tokenizer: PreTrainedTokenizerBase = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{key: name for key, name in special.items() if name is not None},
        chat_template=template,
        model_max_length=metadata.get(f"{metadata.get('general.architecture')}.context_length", 2048),
        clean_up_tokenization_spaces=False,
    )
    return tokenizer
