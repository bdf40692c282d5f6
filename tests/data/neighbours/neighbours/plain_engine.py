"""An engine: transformers as its documentation uses it, a growing cache and one token after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvsuite.case import Case
from kvsuite.engines.engine import Engine, EngineSettings, Session
from kvsuite.engines.loaded_session import LoadedSession
from kvsuite.engines.results import MemoryPass, Served, ServeRequest
from kvsuite.errors import CaseInvalid
from kvsuite.meters.clock import Clock
from kvsuite.meters.memory import AllocatorMeter, Reading
from kvsuite.meters.timing import RequestTimes


class PlainEngine(Engine):
    name = "plain"

    def unavailable(self, device: str) -> str | None:
        return None if device == "cpu" else "engine plain runs on the CPU; use --kv-device=cpu"

    def version(self) -> dict[str, str]:
        from importlib.metadata import version

        return {name: version(name) for name in ("torch", "transformers")}

    def load(self, case: Case, settings: EngineSettings) -> Session:
        return PlainSession(case, settings, attention="sdpa")


class PlainSession(LoadedSession):
    def prepare(self, case: Case) -> None:
        if case.policy is not None:
            raise CaseInvalid(f"engine plain keeps the whole cache and takes no {case.policy}; use --kv-engine=hf")
        self.effective = dict(self._facts)

    def serve(self, requests: Sequence[ServeRequest], clock: Clock | None = None) -> Served:
        """One after the other, as they are: the second waits for the first."""
        outputs = []
        if clock is not None:
            clock.start()
        with torch.inference_mode():
            for request in requests:
                ids, cache, output = torch.tensor([list(request.prompt)]), None, []
                for _ in range(request.new_tokens):
                    found = self.decoder.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    ids, cache = found.logits[:, -1].argmax(-1, keepdim=True), found.past_key_values
                    output.append(int(ids))
                    if clock is not None:
                        clock.mark()
                outputs.append(output)
        if clock is None:
            return Served([], outputs)
        stamps = iter(clock.seconds())
        return Served(
            [
                RequestTimes(len(one.prompt), len(one.prompt), [(next(stamps), 1) for _ in range(one.new_tokens)])
                for one in requests
            ],
            outputs,
        )

    def memory(self, requests: Sequence[ServeRequest]) -> MemoryPass:
        meter = AllocatorMeter(self.device)
        with meter.phase() as prefill, meter.phase() as decode:
            self.serve(requests)
        nothing = Reading(None, "engine plain does not look")
        return MemoryPass(
            prefill, decode, nothing, nothing, None, None, None, [], [], unseen="engine plain does not tell its cache"
        )
