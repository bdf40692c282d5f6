"""Any file in the place of a config.json: a table or one clean error, never a traceback and never a number from nonsense."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from kvsuite.__main__ import USAGE_ERROR, main
from kvsuite.errors import UserError
from kvsuite.memory_model.config import read_fields

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "sliding_window": None,
}  # fmt: skip
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "patch_size": 14, "image_size": 28,
}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 64},
    "qwen2": LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
    "gemma3_text": LLAMA | {
        "model_type": "gemma3_text", "sliding_window": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "gemma3n_text": LLAMA | {
        "model_type": "gemma3n_text", "num_kv_shared_layers": 1, "sliding_window": 64, "intermediate_size": [200, 200, 200],
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "llama4_text": LLAMA | {"model_type": "llama4_text", "attention_chunk_size": 64, "no_rope_layers": [1, 1, 0]},
    "deepseek_v3": LLAMA | {
        "model_type": "deepseek_v3", "num_key_value_heads": 6, "kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16,
    },
    "qwen3_next": LLAMA | {"model_type": "qwen3_next", "full_attention_interval": 3},
    "falcon": {
        "model_type": "falcon", "vocab_size": 320, "hidden_size": 96, "n_layer": 3, "n_head": 6, "multi_query": True,
        "alibi": False, "new_decoder_architecture": False,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 320, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 4096},
    "llava": {"model_type": "llava", "text_config": LLAMA, "vision_config": VISION},
}  # fmt: skip
#: what no field above may hold; what some may (null, true, lists of words) is not among them
NONSENSE = st.one_of(
    st.integers(max_value=-2),
    st.integers(min_value=1 << 41),
    st.just(10**4000),
    st.floats(),
    st.sampled_from([0.5, -1.5, 1e308, float("nan"), float("inf"), float("-inf"), 64.0]),
    st.text(alphabet="ab \n\x1b\ud800é=\"'", max_size=8).filter(
        lambda text: text.strip() != text or not text.isascii()
    ),
    st.just("64"),
    st.just([[[[64]]]]),
    st.just([None]),
    st.just({"a": {"b": [1]}}),
)
ANYTHING = st.one_of(
    NONSENSE,
    st.none(),
    st.booleans(),
    st.integers(-3, 100),
    st.lists(st.one_of(st.integers(-1, 9), st.text(max_size=3)), max_size=4),
)


def predicted(
    content: str | bytes, engine: str = "nano", *more: str, name: str = "config.json"
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``predict`` on a folder with that ``config.json``."""
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["predict", "--model", folder, "--engine", engine, "--space", "ctx=256;chunk=64", *more])
    return code, out.getvalue(), err.getvalue()


def is_clean(found: tuple[int, str, str]) -> bool:
    """A table, or one line that says what to mend."""
    code, out, err = found
    if code == 0:
        return "points in" in out and err == ""
    return code == USAGE_ERROR and out == "" and err[-1] == "\n" and err[:-1].isprintable() and "config.json" in err


@st.composite
def mutated(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> tuple[str, str, dict[str, Any]]:
    """Name of a base, the field that was changed, and the configuration."""
    base = draw(st.sampled_from(sorted(BASES)))
    content = json.loads(json.dumps(BASES[base]))
    part = content
    if base == "llava" and draw(st.booleans()):
        part = content[draw(st.sampled_from(["text_config", "vision_config"]))]
    field = draw(st.sampled_from(sorted(part)))
    part[field] = draw(values)
    return base, field, content


@pytest.mark.parametrize("engine", ["nano", "mlc"])
@pytest.mark.parametrize("base", BASES)
def test_the_bases_are_read(base: str, engine: str) -> None:
    code, out, err = predicted(json.dumps(BASES[base]), engine)
    assert (code, err) == (0, "")
    assert "1 points in" in out


@given(found=mutated(NONSENSE))
@settings(max_examples=150)
def test_nonsense_in_a_field_is_one_line_that_names_it(found: tuple[str, str, dict[str, Any]]) -> None:
    _, field, content = found
    # another object is no nonsense there, only empty of what is needed
    assume(not (field.endswith("_config") and isinstance(content.get(field), dict)))
    with pytest.raises(UserError) as caught:
        read_fields(content, label="x", origin="here/config.json")
    said = str(caught.value)
    assert "here/config.json" in said
    assert field in said
    assert said.isprintable()


@given(found=mutated(ANYTHING), engine=st.sampled_from(["nano", "mlc"]))
@settings(max_examples=100)
def test_anything_in_a_field_is_a_table_or_one_line(found: tuple[str, str, dict[str, Any]], engine: str) -> None:
    assert is_clean(predicted(json.dumps(found[2]), engine))


@given(base=st.sampled_from(sorted(BASES)), data=st.data())
@settings(max_examples=100)
def test_a_field_that_is_missing_is_a_table_or_one_line(base: str, data: st.DataObject) -> None:
    content = dict(BASES[base])
    for field in data.draw(st.sets(st.sampled_from(sorted(content)), min_size=1)):
        del content[field]
    assert is_clean(predicted(json.dumps(content)))


CHAT: dict[str, Any] = {
    "model_type": "llama", "quantization": "q4f16_1", "context_window_size": 4096, "sliding_window_size": -1,
    "prefill_chunk_size": 96,
}  # fmt: skip
INNER = LLAMA | {"prefill_chunk_size": 96, "tensor_parallel_shards": 1, "context_window_size": 4096}


@given(inner=st.booleans(), data=st.data())
@settings(max_examples=100)
def test_anything_in_the_configuration_of_mlc_is_a_table_or_one_line(inner: bool, data: st.DataObject) -> None:
    part = dict(INNER if inner else CHAT)
    field = data.draw(st.sampled_from(sorted(part)))
    part[field] = data.draw(ANYTHING)
    content = CHAT | {"model_config": part} if inner else part | {"model_config": INNER}
    found = predicted(json.dumps(content), "mlc", name="mlc-chat-config.json")
    # a weight format that MLC does not have is no matter of the file's form
    assert is_clean(found) or (field == "quantization" and "no weight format of MLC" in found[2])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*LLAMA, "text_config", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(content=st.one_of(JSON.map(json.dumps), st.binary(max_size=40)))
@example("[" * 100_000)
@example('{"head_dim":' + "[" * 900 + "]" * 900 + "}")
@example('{"a":' * 100_000)
@example('{"vocab_size": ' + "9" * 5000 + "}")
@example("[]")
@example("null")
@example("\ufeff{}")
@settings(max_examples=150)
def test_any_file_is_one_line(content: str | bytes) -> None:
    found = predicted(content)
    assert found[0] == USAGE_ERROR
    assert is_clean(found)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_hidden_layers": -3}, "num_hidden_layers=-3"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 16.5}, "head_dim=16.5"),
        ({"vocab_size": "320"}, "vocab_size=320"),
        ({"hidden_size": True}, "hidden_size=true"),
        ({"hidden_size": float("nan")}, "hidden_size=nan"),
        ({"max_position_embeddings": -5}, "max_position_embeddings=-5"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings=no"),
        ({"model_type": ["llama"]}, "model_type="),
        ({"model_type": ""}, "model_type="),
        ({"text_config": []}, "text_config="),
        ({"text_config": 0}, "text_config=0"),
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers=3 leaves no layer"),
        ({"full_attn_idxs": [1, 3]}, "full_attn_idxs names layer 3 of 3"),
        ({"no_rope_layers": [1, 2, 0]}, "no_rope_layers has 2"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
    ],
)
def test_the_line_names_the_value(changes: dict[str, Any], field: str) -> None:
    code, out, err = predicted(json.dumps(LLAMA | changes))
    assert (code, out) == (USAGE_ERROR, "")
    assert field in err
    assert "correct it there" in err
