"""The samples of a case: made for its model, and told in its record."""

from __future__ import annotations

from kvsuite.case import Case, digest
from kvsuite.engines.engine import Session
from kvsuite.errors import CaseInvalid
from kvsuite.measure.case_run import CaseRun
from kvsuite.workloads.corpus import load_corpus
from kvsuite.workloads.token_rows import require_rows

from .samples import ContextSample, SampleMaker


def require_room(session: Session, length: int, steps: int) -> None:
    """Refuse contexts that, with ``steps`` tokens behind them, the model does not take.

    Raises
    ------
    CaseInvalid
        With both numbers.
    """
    trained = session.model["trained_length"]
    if trained is not None and length + steps > trained:
        raise CaseInvalid(
            f"--kv-task-lengths={length}: with {steps} tokens of questions and answers that is more than the {trained} that "
            "the model takes; give shorter contexts"
        )


def retrieval_samples(case: Case, session: Session, run: CaseRun) -> list[ContextSample]:
    """The samples of a case, whose facts become those of its record's data set.

    Raises
    ------
    CaseInvalid
        If there is no tokenizer, a context cannot say what it should, or an answer cannot be scored.
    """
    workload = case.workload
    corpus = load_corpus(str(workload["corpus"]), num_texts=1)
    if session.tokenizer is None:
        raise CaseInvalid("--kv-model: the model has no tokenizer, so nothing can be asked; give a model with one")
    maker = SampleMaker(
        session.tokenizer,
        "\n\n".join(corpus.texts),
        task=str(workload["task"]),
        length=int(workload["prompt_tokens"]),
        depths=[float(depth) for depth in workload["depths"]],
        seed=int(workload["seed"]),
    )
    samples = maker.samples(int(workload["num_samples"]))
    for sample in samples:
        for asked in sample.asked:
            require_rows(asked.context, session.vocab_size, session.tokenizer)
    hashes = [sample.hash for sample in samples]
    run.found.dataset_revision = digest(hashes)
    run.found.dataset = {
        "name": f"{workload['task']} in {corpus.name}",
        "source": corpus.source,
        "revision": corpus.revision,
        "text_hash": corpus.text_hash,
        "tokens_hash": run.found.dataset_revision,
        "join_rule": "sentences in their order from a random one on, the facts between them",
        "texts": len(samples),
        "notes": list(corpus.notes),
    }
    return samples
