"""Models as people have them, engine by engine: what transformers itself finds, or the refusal that is right.

For each model of the zoo: twelve greedy tokens are those of `generate`, the losses of the full cache and of windows are those
of plain teacher-forced forward passes, and what cannot be measured is refused in words that say why.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import transformers
from zoo import ZOO, Architecture

from kvsuite.case import Case
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.hf.session import HfSession
from kvsuite.engines.nano.session import NanoSession
from kvsuite.engines.results import ServeRequest
from kvsuite.errors import CaseInvalid, CaseSkipped, UserError
from kvsuite.models.layers import layers_of
from kvsuite.workloads.windows import plan_windows

# GPT-BigCode's module compiles a function in a way that torch is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
#: the zoo says what the newest release does; with an older one a model may be refused, and never be wrong
IS_NEWEST = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
Found = TypeVar("Found")
REFUSALS = (UserError, CaseInvalid, CaseSkipped)

SESSIONS = {"hf": HfSession, "nano": NanoSession}
TEXT = "The harbour town grew slowly around the old customs house, and each winter the fishermen repaired their nets."
IDS = list(TEXT.encode()[:40])
PROMPT, NEW, SHORT = IDS[:28], 12, IDS[:20]
WINDOWS = plan_windows("hf-strided", len(IDS), 32, 16, prefix="none")


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Architecture], Path]:
    """Where a model of the zoo lies: made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(architecture: Architecture) -> Path:
        if architecture.name not in made:
            made[architecture.name] = architecture.save(tmp_path_factory.mktemp("zoo"))
        return made[architecture.name]

    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def losses(model: Any, tokens: list[int]) -> torch.Tensor:
    """Losses of ``tokens[1:]`` from one plain forward pass of the others."""
    ids = torch.tensor([tokens])
    # rotary frequencies that follow the length stay as the longest sequence left them: a model that has seen none
    logits = copy.deepcopy(model)(input_ids=ids[:, :-1], use_cache=False).logits[0].double()
    return -logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def losses_of_steps(model: Any, tokens: list[int]) -> torch.Tensor:
    """Losses of ``tokens[1:]``, fed one by one."""
    model, cache, found = copy.deepcopy(model), None, []
    for token, target in itertools.pairwise(tokens):
        output = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(-output.logits[0, -1].double().log_softmax(-1)[target])
    return torch.stack(found)


@functools.cache
def plain(folder: Path) -> tuple[list[int], list[float], list[float]]:
    """What transformers finds by itself: greedy tokens, losses of the text, losses of its windows."""
    config = transformers.AutoConfig.from_pretrained(folder)
    # several releases leave a cap of scores out with sdpa
    attention = "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    prompt = torch.tensor([PROMPT])
    # where the frequencies follow the length, a token that is fed behind others was not turned by the whole text's
    # Zamba 2 computes the state of a single token in another way than that of a text: 2e-3 between its own two
    by_steps = layers_of(model.config.to_dict()).switch_length is not None or model.config.model_type == "zamba2"
    with torch.inference_mode():
        tokens = copy.deepcopy(model).generate(
            prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        # attention is causal: the first losses are those of a shorter text
        whole = (losses_of_steps if by_steps else losses)(model, IDS)
        windows = [losses(model, IDS[w.begin : w.end])[w.first_scored - w.begin - 1 :] for w in WINDOWS]
        return tokens[0, len(PROMPT) :].tolist(), whole.tolist(), torch.cat(windows).tolist()


def policy_case(engine: str, folder: Path, window: int, positions: str) -> Case:
    return Case(
        suite="compression", engine=engine, model=str(folder), name=f"recent_{window}", device="cpu", dtype="float32",
        policy="recent_only", policy_params={"window": window, "positions": positions},
        workload={"prompt_tokens": len(PROMPT), "max_new_tokens": NEW},
    )  # fmt: skip


@functools.cache
def session_of(engine: str, folder: Path) -> HfSession | NanoSession:
    """An engine with a model, loaded once for all that is asked of it."""
    return SESSIONS[engine](policy_case(engine, folder, 1, "original"), EngineSettings(threads=1))


@pytest.fixture(scope="module", autouse=True)
def sessions() -> Iterator[None]:
    yield
    session_of.cache_clear()


def ours(engine: str, folder: Path) -> tuple[list[int], list[float], list[float]]:
    """The same, by an engine."""
    session = session_of(engine, folder)
    session.prepare(replace(policy_case(engine, folder, 1, "original"), name="baseline", policy=None, policy_params={}))
    [tokens] = session.serve([ServeRequest(PROMPT, NEW)]).outputs
    whole = session.score(IDS, "streaming-decode", 0).nll
    windows = session.score_windows(IDS, WINDOWS, prefix="none", prefix_token=None).tokens.nll
    session.finish()
    return tokens, whole, windows


def unless_refused(find: Callable[[str, Path], Found], engine: str, folder: Path) -> Found:
    """What an engine finds; a model that an older release cannot do is skipped."""
    try:
        return find(engine, folder)
    except REFUSALS as error:
        if IS_NEWEST:
            raise
        pytest.skip(f"transformers {transformers.__version__}: {error}")


def row(engine: str, architecture: Architecture) -> Any:
    return pytest.param(engine, architecture, id=f"{engine}-{architecture.name}")


@pytest.mark.parametrize(("engine", "architecture"), [row(engine, each) for each in ZOO for engine in SESSIONS])
def test_an_engine_finds_what_transformers_finds_or_says_why_not(
    engine: str, architecture: Architecture, folder_of: Callable[[Architecture], Path]
) -> None:
    refusal = getattr(architecture, engine)
    folder = folder_of(architecture)
    if refusal is not None and IS_NEWEST:
        with pytest.raises(REFUSALS, match=refusal):
            ours(engine, folder)
        return
    found = unless_refused(ours, engine, folder)
    expected = plain(folder)
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], abs=1e-4)
    assert found[2] == pytest.approx(expected[2], abs=1e-4)


@pytest.mark.parametrize(
    ("engine", "architecture"),
    [row(engine, each) for each in ZOO for engine in SESSIONS if getattr(each, engine) is None],
)
def test_policies_leave_alone_what_is_not_theirs_or_are_invalid(
    engine: str, architecture: Architecture, folder_of: Callable[[Architecture], Path]
) -> None:
    """A budget longer than the text changes no loss. With a shorter one the last tokens are kept, whose distances are those of
    their places: where distances alone matter, keys that are turned to their places see the same."""
    folder = folder_of(architecture)
    layers = layers_of(architecture.configured().to_dict())
    # nothing may stand against a policy on a plain model, and against places only what turns otherwise or not at all
    turns = layers.positions == "rotary" and layers.switch_length is None and layers.learned_length is None
    session = unless_refused(session_of, engine, folder)

    def scored(window: int, positions: str, must: bool) -> list[float] | None:
        case = policy_case(engine, folder, window, positions)
        try:
            session.prepare(case)
            return session.score(SHORT, "streaming-decode", 0).nll
        except CaseInvalid:
            assert not (must and IS_NEWEST)
            return None
        finally:
            session.finish()

    # ALiBi counts the places of a whole cache
    found = scored(60, "original", layers.plain and layers.positions != "alibi")
    assert found is None or found == pytest.approx(plain(folder)[1][: len(SHORT) - 1], abs=1e-4)
    turned, kept = scored(8, "cache", layers.plain and turns), scored(8, "original", False)
    if turned is not None:
        assert turned == pytest.approx(kept, abs=1e-4)
