"""Texts and prompts of a run, tokenised once for every session."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvsuite.case import digest
from kvsuite.errors import UserError
from kvsuite.meters.quality import TokenScores
from kvsuite.meters.reference_rows import ReferenceRows
from kvsuite.models.images import ImagePixels

from .corpus import Corpus, load_corpus
from .prompts import make_prompts
from .serving_requests import ServingRequests, WorkloadModel, serving_requests
from .serving_workload import LIGHT, ServingWorkload
from .token_rows import require_rows
from .windowed import WindowedText, WindowedTexts, WindowRule, prefix_token

# the original used only texts of more than 10,000 characters of this corpus
_MIN_CHARS = {"pg19": 10_000}
# long prompts need more text than the articles have
_SERVING = ("default", "pydoc")
_TOKENIZERS = "as the tokenizer adds it"


@dataclass(frozen=True)
class ScoredTexts:
    """Token windows to score, and where they come from."""

    tokens: tuple[list[int], ...]
    hashes: tuple[str, ...]
    revision: str
    facts: dict[str, Any]


@dataclass
class TextSource:
    """Loads each corpus once, tokenises each text once, scores each full-cache reference once.

    Parameters
    ----------
    datasets
        What to read for a perplexity case's data set, by its name: the same name, or a path.
    dataset_path
        Local file that is read for the one data set named.
    """

    datasets: Mapping[str, str] = field(default_factory=dict)
    dataset_path: str | None = None
    _corpora: dict[tuple[str | int | bool, ...], Corpus] = field(default_factory=dict)
    _windowed: dict[tuple[Any, ...], tuple[WindowedText, ...]] = field(default_factory=dict)
    _tokens: dict[tuple[Any, ...], list[list[int]]] = field(default_factory=dict)
    _references: dict[tuple[Any, ...], TokenScores] = field(default_factory=dict)
    _rows: dict[tuple[Any, ...], ReferenceRows] = field(default_factory=dict)
    _session: Any = None

    def scored(self, session: Any, workload: Mapping[str, Any], *, tokens: int) -> ScoredTexts:
        """The first ``tokens`` tokens of each of the workload's texts.

        Raises
        ------
        UserError
            If a text is shorter, or there is no tokenizer.
        CaseInvalid
            If a token has no row in the model's embedding.
        """
        corpus = self._corpus(workload)
        texts = []
        for index, ids in enumerate(self._tokenised(session, corpus)):
            if len(ids) < tokens:
                raise UserError(
                    f"--kv-max-tokens: text {index + 1} of corpus {corpus.name} has {len(ids)} tokens, {tokens} are "
                    "needed; lower --kv-max-tokens (or --kv-prompt-tokens) or give a longer --kv-corpus"
                )
            texts.append(ids[:tokens])
        _require_rows(session, texts)
        hashes = tuple(digest(ids) for ids in texts)
        revision = digest(list(hashes))
        facts = _facts(corpus, revision, len(texts)) | {"bos": _TOKENIZERS}
        return ScoredTexts(tuple(texts), hashes, revision, facts)

    def streams(self, session: Any, workload: Mapping[str, Any]) -> ScoredTexts:
        """The first ``eval_tokens`` tokens of each of the workload's texts, or all where there are fewer.

        Raises
        ------
        UserError
            If a text has fewer than two, or there is no tokenizer.
        CaseInvalid
            If a token has no row in the model's embedding.
        """
        corpus = self._corpus(workload)
        texts = [ids[: workload["eval_tokens"]] for ids in self._tokenised(session, corpus)]
        _require_rows(session, texts)
        short = [index for index, ids in enumerate(texts) if len(ids) < 2]
        if short:
            raise UserError(
                f"--kv-corpus={workload['corpus']}: text {short[0] + 1} has no two tokens to score; give a longer text"
            )
        hashes = tuple(digest(ids) for ids in texts)
        revision = digest(list(hashes))
        return ScoredTexts(tuple(texts), hashes, revision, _facts(corpus, revision, len(texts)) | {"bos": _TOKENIZERS})

    def windowed(self, session: Any, workload: Mapping[str, Any], rule: WindowRule) -> WindowedTexts:
        """The texts of a perplexity case, tokenised and cut into windows.

        Raises
        ------
        UserError
            If a text cannot be read, or is too short, or there is no tokenizer.
        CaseInvalid
            If a token has no row in the model's embedding.
        """
        corpus = self._dataset(workload)
        tokenizer = _tokenizer(session)
        prefix_rule = rule.resolved(tokenizer)
        self._follow(session)
        key = (corpus.text_hash, rule)
        if key not in self._windowed:
            typed = "=".join(self._asked(str(workload["dataset"])))
            self._windowed[key] = tuple(rule.cut(tokenizer, text, prefix_rule, typed=typed) for text in corpus.texts)
        texts = self._windowed[key]
        prefix = prefix_token(tokenizer)
        before = [] if prefix_rule == "none" or prefix is None else [prefix]
        _require_rows(session, [before, *(text.tokens for text in texts)])
        revision = digest([digest(text.tokens) for text in texts])
        facts = _facts(corpus, revision, len(texts)) | {
            "bos": prefix_rule,
            "split": corpus.split,
            "windows": sum(len(text.windows) for text in texts),
        }
        return WindowedTexts(texts, prefix_rule, prefix, revision, facts)

    def reference(self, session: Any, tokens: list[int], first: int) -> TokenScores:
        """Full-cache losses of ``tokens[first:]``, the same for every case of the session."""
        self._follow(session)
        key = (digest(tokens), first)
        if key not in self._references:
            self._references[key] = session.score_reference(tokens, first)
        return self._references[key]

    def reference_rows(
        self, session: Any, tokens: list[int], protocol: str, prefix: int, progress: Callable[[int, int], None]
    ) -> ReferenceRows:
        """Log-probabilities of the full cache in the model's dtype, served as the cases are: one pass a text and session."""
        self._follow(session)
        key = (digest(tokens), protocol, prefix)
        if key not in self._rows:
            rows = ReferenceRows()
            rows.scores = session.score_rows(tokens, protocol, prefix, rows.add, full=True, progress=progress)
            self._rows[key] = rows
        return self._rows[key]

    def whole_rows(self, session: Any, tokens: list[int]) -> ReferenceRows:
        """Log-probabilities of the full cache in the model's dtype by one forward pass: one a text and session."""
        self._follow(session)
        key = (digest(tokens), "whole")
        if key not in self._rows:
            rows = ReferenceRows()
            rows.scores = session.score_whole(tokens, rows.add, full=True).tokens
            self._rows[key] = rows
        return self._rows[key]

    def prompts(self, session: Any, workload: Mapping[str, Any], *, count: int, seed: int) -> list[list[int]]:
        """Different prompts of the workload's length.

        Windows of the compression suite's texts; random tokens where there is no tokenizer, and in the perplexity suite, whose
        texts may be shorter than a prompt.
        """
        pool = None
        if session.tokenizer is not None and "corpus" in workload:
            pool = [token for ids in self._tokenised(session, self._corpus(workload)) for token in ids]
            _require_rows(session, [pool])
        return make_prompts(
            count=count,
            length=int(workload["prompt_tokens"]),
            vocab_size=session.vocab_size,
            seed=seed,
            token_pool=pool,
        )

    def serving(
        self,
        session: Any,
        workload: ServingWorkload,
        *,
        seed: int,
        trace: str | None = None,
        dataset_dir: str | None = None,
        corpus: str = "default",
        num_samples: int = 1,
        image: ImagePixels | None = None,
    ) -> ServingRequests:
        """The requests of a workload under load for the session's model.

        Parameters and errors are those of `serving_requests`, and of `load_corpus` for ``corpus`` and ``num_samples``;
        ``default`` is followed by the text that every CPython has, because long prompts need more.
        """
        self._follow(session)
        corpora: list[Corpus] = []
        text: list[int] = []
        passages: list[list[int]] = []
        if session.tokenizer is not None:
            names = dict.fromkeys(_SERVING, 1) if corpus == "default" else {corpus: num_samples}
            corpora = [self._corpus({"corpus": name, "num_samples": count}) for name, count in names.items()]
            if workload.name == LIGHT:
                passages = [ids for each in corpora for ids in self._passages(session, each)]
            else:
                text = [token for each in corpora for ids in self._tokenised(session, each) for token in ids]
        name = " and ".join(each.name for each in corpora)
        shape = getattr(session, "image_shape", WorkloadModel.image_shape)
        model = WorkloadModel(session.vocab_size, session.tokenizer, text, passages, name, shape)
        return serving_requests(workload, model, seed=seed, trace=trace, dataset_dir=dataset_dir, image=image)

    def _passages(self, session: Any, corpus: Corpus) -> list[list[int]]:
        key = (corpus.text_hash, "passages")
        if key not in self._tokens:
            found = [part.strip("\n") for text in corpus.texts for part in text.split("\n\n")]
            # an empty text is no prompt, and some tokenizers refuse an empty list
            filled = [part for part in found if part.strip()]
            self._tokens[key] = [list(ids) for ids in session.tokenizer(filled, verbose=False)["input_ids"]]
        return self._tokens[key]

    def _corpus(self, workload: Mapping[str, Any]) -> Corpus:
        key = (str(workload["corpus"]), int(workload["num_samples"]))
        if key not in self._corpora:
            self._corpora[key] = load_corpus(key[0], num_texts=key[1], min_chars=_MIN_CHARS.get(key[0], 0))
        return self._corpora[key]

    def _dataset(self, workload: Mapping[str, Any]) -> Corpus:
        name, drop_blank = str(workload["dataset"]), workload["blank_rows"] == "drop"
        request, path = self.datasets.get(name, name), self.dataset_path
        split = None if workload["split"] == "auto" else str(workload["split"])
        key = (request, path or "", split or "", int(workload["num_samples"]), drop_blank)
        if key not in self._corpora:
            self._corpora[key] = load_corpus(
                request,
                num_texts=int(workload["num_samples"]),
                min_chars=_MIN_CHARS.get(name, 0),
                split=split,
                option=self._asked(name)[0],
                path=path,
                drop_blank=drop_blank,
                join=True,
            )
        return self._corpora[key]

    def _asked(self, name: str) -> tuple[str, str]:
        """The option that says where a data set's text is, and its value."""
        if self.dataset_path:
            return "--kv-dataset-path", self.dataset_path
        return "--kv-dataset", self.datasets.get(name, name)

    def _tokenised(self, session: Any, corpus: Corpus) -> list[list[int]]:
        self._follow(session)
        key = (corpus.text_hash, len(corpus.texts))
        if key not in self._tokens:
            tokenizer = _tokenizer(session)
            self._tokens[key] = [list(tokenizer(text, verbose=False)["input_ids"]) for text in corpus.texts]
        return self._tokens[key]

    def _follow(self, session: Any) -> None:
        if session is not self._session:
            self._session = session
            self._tokens.clear()
            self._windowed.clear()
            self._references.clear()
            self._rows.clear()


def _tokenizer(session: Any) -> Any:
    if session.tokenizer is None:
        raise UserError(
            "--kv-model: the model has no tokenizer, so no text can be scored; give a model with one, or put its "
            "tokenizer's files into the folder"
        )
    return session.tokenizer


def _require_rows(session: Any, texts: Iterable[Iterable[int]]) -> None:
    for tokens in texts:
        require_rows(tokens, session.vocab_size, session.tokenizer)


def _facts(corpus: Corpus, tokens_hash: str, texts: int) -> dict[str, Any]:
    return {
        "name": corpus.name,
        "source": corpus.source,
        "revision": corpus.revision,
        "text_hash": corpus.text_hash,
        "tokens_hash": tokens_hash,
        "join_rule": corpus.join_rule,
        "texts": texts,
        "notes": list(corpus.notes),
    }
