"""GGUF files: dense transformers models with the tokenizer that the file itself describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError

# gguf.TokenType
_CONTROL, _USER_DEFINED = 3, 4

# how text is cut before merging, by tokenizer.ggml.pre; the expressions are those of llama.cpp, src/llama-vocab.cpp
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (_GPT2,),
    "gpt-2": (_GPT2,),
    "olmo": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "command-r": (r"\p{N}", _GPT2),
    "llama-bpe": (_MODERN % "{1,3}",),
    "llama3": (_MODERN % "{1,3}",),
    "qwen2": (_MODERN % "",),
    "deepseek-r1-qwen": (_MODERN % "",),
}
_BOS_BY_DEFAULT = {"llama-bpe", "llama3"}


def read_fields(path: Path) -> dict[str, Any]:
    """Read the key-value fields of a GGUF file as Python values.

    Raises
    ------
    UserError
        If the file is no GGUF or is cut short.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        return {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise _damaged(path, error) from error


def bpe_tokenizer(fields: Mapping[str, Any]) -> Any:
    """Build the byte-level BPE tokenizer that the fields of a GGUF file describe.

    transformers' own conversion takes these fields for another tokenizer family (SmolLM2 comes out as CodeLlama and no
    longer round-trips), so it is built here.

    Parameters
    ----------
    fields
        As `read_fields` returns them; ``tokenizer.ggml.model`` must be ``gpt2``.

    Returns
    -------
    transformers.PreTrainedTokenizerFast
        With bos, eos, pad and unk tokens, the chat template, and the bos rule of the file.

    Raises
    ------
    UserError
        If the way the text is cut (``tokenizer.ggml.pre``) is not known.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise UserError(
            f"--kv-model: the GGUF names the pre-tokenizer {pre!r}, known are {', '.join(_PRE_TOKENIZERS)}; "
            "give the model as a Hugging Face folder"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _BOS_BY_DEFAULT))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(rule), "isolated") for rule in _PRE_TOKENIZERS[pre]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    typed = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in typed if k == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in typed if k == _USER_DEFINED])

    special = {}
    for role, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = fields.get(f"tokenizer.ggml.{field}_token_id")
        if token_id is not None:
            special[f"{role}_token"] = tokens[token_id]
    special.setdefault("pad_token", special.get("eos_token"))
    if fields.get("tokenizer.ggml.add_bos_token", pre in _BOS_BY_DEFAULT) and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    context = fields.get(f"{fields['general.architecture']}.context_length")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **special,
        **({"model_max_length": int(context)} if context else {}),
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def gguf_tokenizer(path: Path, fields: Mapping[str, Any]) -> Any:
    """Return the tokenizer of a GGUF file: `bpe_tokenizer` for byte-level BPE, transformers' own for the others."""
    if fields.get("tokenizer.ggml.model") == "gpt2":
        return bpe_tokenizer(fields)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)


def gguf_model(path: Path, *, dtype: str, attention: Callable[[Any], str] = lambda config: "sdpa") -> Any:
    """Load the weights of a GGUF file as a dense model on the CPU, without any trace of the quantiser.

    Parameters
    ----------
    path
        The ``.gguf`` file.
    dtype
        Canonical dtype name; the blocks are dequantised in float32 and cast.
    attention
        Gives transformers' name of the attention function for a configuration.

    Raises
    ------
    UserError
        If the file is damaged or transformers does not know its architecture.
    """
    import torch
    import transformers
    from accelerate import init_empty_weights

    # from 5.22 on transformers would keep the blocks packed where it finds a kernel for the device
    config_type = getattr(transformers, "GgufConfig", None)
    extra = {} if config_type is None else {"quantization_config": config_type(dequantize=True)}
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=getattr(torch, dtype), local_files_only=True, **extra
        )
    except (ValueError, KeyError, IndexError, OSError, NotImplementedError) as error:
        raise _damaged(path, error) from error
    fields = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "architectures", "transformers_version"):
        fields.pop(name, None)
    config = type(loaded.config)(**fields)
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention(config)
        )
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model.eval()


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return UserError(f"--kv-model={path}: no GGUF file that can be loaded ({reason}); get it again or give another")
