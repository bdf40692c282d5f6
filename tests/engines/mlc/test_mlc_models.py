"""Models made ready for MLC: which commands run, what is cached under which key, what is left behind by a failure.

The stand-in writes files with the names of the real commands' and no content: that real libraries run is not shown here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlc_doubles import commands, mistral, mlc_double
from tiny_checkpoint import save_checkpoint
from transformers import AutoTokenizer

from kvsuite.engines.engine_process import EngineFailed
from kvsuite.engines.mlc.install import MlcInstall, find_install
from kvsuite.engines.mlc.models import LIBRARY, MlcModels, Overrides
from kvsuite.engines.mlc.source import rope_fields, tokenizer_of_random_weights
from kvsuite.errors import CaseInvalid
from kvsuite.models.resolve import resolve_model

POINT = Overrides(48, 16, 3)


class Workshop:
    """A cache and the commands that filled it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch, self.log = folder, patch, folder / "commands"
        self.root = folder / "cache" / "mlc"
        self.install = find_install(sys.executable)

    def models(
        self, model: Path | str, *, install: MlcInstall | None = None, device: str = "vulkan:0", **given: Any
    ) -> MlcModels:
        chosen = {"deadline_s": 60.0, "seed": 0, "cache_dir": self.folder / "cache"} | given
        return MlcModels(
            resolve_model(str(model)), chosen.pop("quantization", "q4f16_1"), install or self.install, device=device,
            root=self.root, **chosen,
        )  # fmt: skip

    def ran(self) -> list[str]:
        """Names of the commands since the last look."""
        names = [line[0] for line in commands(self.log)]
        self.log.unlink(missing_ok=True)
        return names


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    with mlc_double(tmp_path / "commands") as patch:
        yield Workshop(tmp_path, patch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def test_from_a_checkpoint_to_a_library(workshop: Workshop, checkpoint: Path) -> None:
    models = workshop.models(checkpoint)
    made = models.compiled(POINT)
    convert, config, compiled = commands(workshop.log)
    (source,) = workshop.root.glob("source-*")
    assert convert[:6] == ["convert_weight", str(source), "--quantization", "q4f16_1", "--device", "cpu"]
    assert config[:-2] == [
        "gen_config", str(source), "--quantization", "q4f16_1", "--conv-template", "LM", "--context-window-size=48",
        "--prefill-chunk-size=16", "--max-batch-size=3",
    ]  # fmt: skip
    assert (compiled[0], compiled[2:4]) == ("compile", ["--device", "vulkan:0"])
    folder = Path(made.model)
    assert made.library == folder / LIBRARY
    assert {path.name for path in folder.iterdir()} == {
        "mlc-chat-config.json", "tokenizer.json", "params_shard_0.bin", "tensor-cache.json", LIBRARY, "kvsuite.json",
        "library.json",
    }  # fmt: skip
    assert (models.weights_bytes, made.function_bytes) == (1000, 16_000)
    # links stay right where the cache is moved as a whole
    moved = workshop.folder / "elsewhere"
    workshop.root.rename(moved)
    assert (moved / folder.name / "params_shard_0.bin").stat().st_size == 1000
    facts = json.loads((moved / folder.name / "kvsuite.json").read_text())
    assert (facts["mlc_llm"], facts["tvm"], facts["overrides"]["max_batch_size"]) == ("0.20.0.dev0", "0.26.0", 3)


def test_the_compiler_switches_on_what_is_asked(workshop: Workshop, checkpoint: Path) -> None:
    for opt, words in ((None, []), ("flashinfer=0;cudagraph=1", ["--opt", "flashinfer=0;cudagraph=1"])):
        workshop.models(checkpoint, opt=opt).compiled(POINT)
        (*_, compiled) = commands(workshop.log, "compile")
        assert compiled[2:-2] == ["--device", "vulkan:0", *words]


def test_the_rotation_is_written_as_mlc_reads_it(workshop: Workshop, tmp_path: Path) -> None:
    scaled = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    model = mistral(tmp_path / "model", rope_parameters=scaled)
    models = workshop.models(model)
    (source,) = workshop.root.glob("source-*")
    config = json.loads((source / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, {"rope_type": "llama3", "factor": 8.0})
    made = models.compiled(Overrides(48, 16, 1, -1, 0))
    inner = json.loads((Path(made.model) / "mlc-chat-config.json").read_text())["model_config"]
    assert inner["position_embedding_base"] == 5e5
    assert "rope_theta" not in json.loads((model / "config.json").read_text())


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({}, {}),
        ({"rope_theta": 1e6}, {}),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 5e5}}, {}),
        ({"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, {"rope_theta": 1e5}),
        # several rotations in one model have no name in MLC
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, {}),
    ],
)
def test_names_of_the_rotation(config: dict[str, Any], fields: dict[str, Any]) -> None:
    assert rope_fields(config) == fields


def test_a_rotation_that_mlc_takes_for_another_is_no_model(workshop: Workshop, tmp_path: Path) -> None:
    workshop.patch.setattr("kvsuite.engines.mlc.source.rope_fields", lambda config: {})
    model = mistral(tmp_path / "model", rope_parameters={"rope_theta": 1e5})
    with pytest.raises(CaseInvalid, match="rotates with a base of 10000, the model with 100000"):
        workshop.models(model).compiled(Overrides(48, 16, 1, -1, 0))


def test_the_same_is_made_once_and_all_that_matters_makes_it_anew(workshop: Workshop, checkpoint: Path) -> None:
    first = workshop.models(checkpoint).compiled(POINT)
    assert workshop.ran() == ["convert_weight", "gen_config", "compile"]
    assert workshop.models(checkpoint).compiled(POINT) == first
    assert workshop.ran() == []
    seen = {first.model}
    for change, anew in (
        ({"point": replace(POINT, prefill_chunk_size=24)}, ["gen_config", "compile"]),
        ({"point": replace(POINT, max_batch_size=4)}, ["gen_config", "compile"]),
        ({"device": "cpu"}, ["gen_config", "compile"]),
        ({"opt": "flashinfer=0;cudagraph=1"}, ["gen_config", "compile"]),
        ({"quantization": "q0f16"}, ["convert_weight", "gen_config", "compile"]),
        ({"install": replace(workshop.install, mlc_llm="0.21")}, ["convert_weight", "gen_config", "compile"]),
        ({"install": replace(workshop.install, tvm="0.27")}, ["convert_weight", "gen_config", "compile"]),
        ({"install": replace(workshop.install, library="abc")}, ["convert_weight", "gen_config", "compile"]),
    ):
        given: dict[str, Any] = dict(change)
        point = given.pop("point", POINT)
        made = workshop.models(checkpoint, **given).compiled(point)
        assert workshop.ran() == anew, change
        assert made.model not in seen
        seen.add(made.model)


def test_one_byte_in_the_middle_of_the_weights_is_another_model(workshop: Workshop, tmp_path: Path) -> None:
    model = mistral(tmp_path / "model")
    weights = bytearray(4 << 20)
    (model / "model.safetensors").write_bytes(weights)
    first = workshop.models(model).weights
    weights[2 << 20] = 1
    (model / "model.safetensors").write_bytes(weights)
    assert workshop.models(model).weights != first


def test_a_windows_fields_are_written_where_the_family_has_them(workshop: Workshop, tmp_path: Path) -> None:
    model = mistral(tmp_path / "model", sliding_window=32)
    models = workshop.models(model)
    for point in (Overrides(48, 16, 1, 24, 2), Overrides(48, 16, 1, -1, 0)):
        made = models.compiled(point)
        config = json.loads((Path(made.model) / "mlc-chat-config.json").read_text())
        assert config["model_config"] | point.given() == config["model_config"]
        given = commands(workshop.log, "gen_config")[-1]
        assert f"--sliding-window-size={point.sliding_window_size}" in given
        assert f"--attention-sink-size={point.attention_sink_size}" in given


def test_weights_that_are_mlcs_already_get_a_configuration_and_a_library(workshop: Workshop, checkpoint: Path) -> None:
    own = Path(workshop.models(checkpoint).compiled(POINT).model)
    workshop.ran()
    models = workshop.models(own)
    made = models.compiled(Overrides(32, 8, 2))
    assert workshop.ran() == ["compile"]
    config = json.loads((Path(made.model) / "mlc-chat-config.json").read_text())
    for place in (config, config["model_config"]):
        assert (place["context_window_size"], place["prefill_chunk_size"]) == (32, 8)
    assert config["model_config"]["max_batch_size"] == 2
    # theirs is as it was, and its library was not taken
    assert json.loads((own / "mlc-chat-config.json").read_text())["context_window_size"] == 48
    assert not (Path(made.model) / LIBRARY).is_symlink()
    assert models.weights_bytes == 1000


def test_what_mlc_changes_by_itself_is_no_point(workshop: Workshop, checkpoint: Path) -> None:
    with pytest.raises(CaseInvalid, match="prefill_chunk_size=64: MLC's configuration of tiny has 48 there"):
        workshop.models(checkpoint).compiled(Overrides(48, 64, 1))


@pytest.mark.parametrize("fault", ["fail_compile", "hang_compile"])
def test_a_failure_leaves_nothing_and_says_what_was_printed(fault: str, workshop: Workshop, checkpoint: Path) -> None:
    workshop.patch.setenv("MLC_DOUBLE", fault)
    message = "Cannot find target for device" if fault == "fail_compile" else "mlc_llm compile was killed after 6 s"
    with pytest.raises(EngineFailed, match=message):
        workshop.models(checkpoint, deadline_s=6.0).compiled(POINT)
    assert sorted(path.name.partition("-")[0] for path in workshop.root.iterdir() if path.is_dir()) == [
        "source",
        "weights",
    ]
    workshop.patch.delenv("MLC_DOUBLE")
    workshop.models(checkpoint).compiled(POINT)


def test_random_weights_get_a_folder_and_a_tokenizer(workshop: Workshop) -> None:
    workshop.models("dummy:tiny").compiled(POINT)
    sources = list(workshop.root.glob("source-*"))
    assert sources
    for source in sources:
        assert (source / "model.safetensors").is_file()
        # MLC samples among the tokens that the tokenizer has
        vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
        tokenizer = AutoTokenizer.from_pretrained(source)
        assert len(tokenizer) == max(256, vocabulary)
    workshop.models("dummy:tiny")
    assert workshop.ran() == ["convert_weight", "gen_config", "compile"]


def test_all_but_the_bytes_of_random_weights_are_whole_texts_of_their_own() -> None:
    tokenizer = tokenizer_of_random_weights(300)
    assert tokenizer.decode(tokenizer.encode("grüße")) == "grüße"
    texts = [tokenizer.decode([token]) for token in range(256, 300)]
    assert len(set(texts)) == 44
    assert all(text.isascii() and text for text in texts)
    assert tokenizer.decode([256, 299, 256]) == "".join(texts[index] for index in (0, 43, 0))
