"""A kvsuite session as a model of lm-evaluation-harness: context -> compressed cache -> continuation, scored or generated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text

from kvsuite.engines.questions import Answer, Asked, Ends, Question
from kvsuite.errors import CaseInvalid

from .published_task import Asking

# parameters of greedy decoding that change nothing, or are read here
_GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "max_length"}
# lm-eval's own, where a task says nothing
_MAX_NEW_TOKENS = 256


class SessionModel(TemplateLM):  # type: ignore[misc]
    """What lm-eval drives: its requests become contexts and questions.

    lm-eval gives the context in one piece. All of it but its last token is prefilled, and the case's method acts at its end;
    the last token is fed through what is left, so that the whole continuation, its first token too, is predicted from the
    cache as it is served. Without a method that is the log-likelihood of lm-eval's own models.

    Parameters
    ----------
    asking
        Session and case.
    """

    def __init__(self, asking: Asking) -> None:
        super().__init__()
        self._asking = asking
        self.tokenizer = asking.tokenizer
        #: of each context that was asked: its tokens, and the positions kept of them
        self.contexts: list[tuple[int, float]] = []
        #: token ids of the longest of them
        self.longest: Sequence[int] = ()
        #: what the session raised, which is no fault of the task's
        self.failed: Exception | None = None

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        own = self.tokenizer.bos_token_id
        return self.eot_token_id if own is None else int(own)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, by the rule of lm-eval's ``hf`` model: special tokens as the tokenizer does, and no begin twice."""
        special = True if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            special = False
        return [int(one) for one in self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"]]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for (_, continuation), _, right in requests:
            if not right:
                raise CaseInvalid(f"the continuation {continuation!r} has no token of its own, so it cannot be scored")
        answers = self._ask(
            [context for _, context, _ in requests],
            [functools.partial(_scored, right) for _, _, right in requests],
        )
        return [
            (-sum(answer.nll), answer.output == right) for answer, (_, _, right) in zip(answers, requests, strict=True)
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        stops: list[list[str]] = []
        questions: list[Callable[[list[int]], Question]] = []
        for request in requests:
            until, most = self._settings(request.args[1])
            stops.append(until)
            questions.append(functools.partial(_generated, most, self._ends(until)))
        answers = self._ask([self.tok_encode(request.args[0]) for request in requests], questions)
        return [
            str(postprocess_generated_text(self._text(answer.output), until, None))
            for answer, until in zip(answers, stops, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        raise CaseInvalid(
            "its requests are whole texts (loglikelihood_rolling): without a split into context and continuation there is no "
            "cache to compress before something is scored; the compression and perplexity suites measure that"
        )

    def _settings(self, given: dict[str, Any]) -> tuple[list[str], int]:
        """Stop strings, and tokens at most, of one request's generation.

        Raises
        ------
        CaseInvalid
            For anything but greedy decoding.
        """
        own = normalize_gen_kwargs(given, _MAX_NEW_TOKENS)
        others = sorted(set(own) - _GREEDY)
        if own.get("do_sample") or others:
            asked = "do_sample" if own.get("do_sample") else ", ".join(others)
            raise CaseInvalid(
                f"its generation_kwargs ask for {asked}; kvsuite decodes greedily, so give a task that does"
            )
        until = own["until"]
        return [one for one in ([until] if isinstance(until, str) else until) if one], int(own["max_gen_toks"])

    def _ends(self, until: Sequence[str]) -> Ends:
        return lambda output: output[-1] == self.eot_token_id or any(one in self._text(output) for one in until)

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _ask(self, contexts: Sequence[list[int]], questions: Sequence[Callable[[list[int]], Question]]) -> list[Answer]:
        """Answers in the order of the requests; those of one context are asked from one cache.

        Parameters
        ----------
        contexts
            Token ids.
        questions
            What makes a question of a context's last token.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, context in enumerate(contexts):
            groups.setdefault(tuple(context), []).append(place)
        short = sum(len(context) < 2 for context in groups)
        if short:
            raise CaseInvalid(
                f"{short} of its {len(groups)} contexts are empty or one token long: there is no cache to compress; "
                "give a task whose requests have a context"
            )
        asked = [
            Asked(list(context[:-1]), tuple(questions[place]([context[-1]]) for place in places))
            for context, places in groups.items()
        ]
        found: dict[int, Answer] = {}
        try:
            answered = self._asking.answers(asked)
        except Exception as error:
            self.failed = error
            raise
        for one, places, answers in zip(asked, groups.values(), answered, strict=True):
            found |= zip(places, answers, strict=True)
            self.contexts.append((len(one.context), answers[0].kept))
        self.longest = max((one.context for one in asked), key=len)
        return [found[place] for place in range(len(contexts))]


def _scored(right: Sequence[int], last: list[int]) -> Question:
    return Question(last, right)


def _generated(most: int, ends: Ends, last: list[int]) -> Question:
    return Question(last, (), most, ends)
