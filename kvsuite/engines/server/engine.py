"""The `server` engine: where it is, what it runs, and loading a session."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, ClassVar

from kvsuite.case import Case
from kvsuite.engines.engine import Engine, EngineSettings
from kvsuite.engines.serving_plan import ServingPlan
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.meters.environment import installed_versions
from kvsuite.models.load import load_tokenizer
from kvsuite.models.resolve import resolve_model
from kvsuite.options.option import OptionGroup
from kvsuite.options.resolve import Options

from .endpoint import INSTALL, Endpoint
from .failure import Refused, ServerFailed
from .options import ServerOptions

if TYPE_CHECKING:
    from .session import ServerSession

_NO_URL = "--kv-engine=server: give the server's address, e.g. --kv-server-url=http://localhost:8000"
#: what a run waits for to learn the version of a server
_VERSION_S = 5.0


class ServerEngine(Engine):
    """Asks a server that somebody else started."""

    name: ClassVar[str] = "server"
    option_group: ClassVar[type[OptionGroup] | None] = ServerOptions

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self._own = self.options.of(ServerOptions)
        self._software: dict[str, str] | None = None

    def unavailable(self, device: str) -> str | None:
        if importlib.util.find_spec("httpx") is None:
            return f"engine server: needs httpx: {INSTALL}"
        return None

    def version(self) -> dict[str, str]:
        found = installed_versions("httpx")
        if self._own.server_url is None or not found:
            return found
        if self._software is None:
            self._software = {"endpoint": self._own.server_url} | self._ask(self._own.server_url)
        return found | self._software

    def default_formats(self, model: str) -> tuple[str, ...]:
        # weights are as the server has them
        return ("none",)

    def refuse(self, case: Case) -> None:
        super().refuse(case)
        asked, mend = None, "leave it out"
        plan = ServingPlan.of(case)
        if case.quantization is not None:
            asked, mend = (
                f"--kv-quantization={case.quantization}",
                "start the server with such weights, and give none here",
            )
        elif case.policy is not None:
            asked, mend = f"the cache policy {case.policy}", "use --kv-engine=nano or hf"
        elif case.partition is not None:
            asked, mend = "an SM partition", "use --kv-engine=nano"
        elif plan is not None and (plan.lanes != 1 or plan.controller is not None):
            asked, mend = "two lanes", "use --kv-engine=nano, or --kv-variants=baseline"
        elif plan is not None and not plan.prompts_first:
            asked, mend = "chunks of prompts beside decoding", "start the server so, and use --kv-variants=baseline"
        if asked is not None:
            raise CaseInvalid(f"engine server: {asked} cannot be asked of a server by its client; {mend}")

    def load(self, case: Case, settings: EngineSettings) -> ServerSession:
        from .dialect import find_dialect
        from .served_model import find_model, require_tokenizer
        from .session import ScoringServerSession, ServerSession

        own = self._own
        if own.server_url is None:
            raise UserError(_NO_URL)
        spec = resolve_model(case.model, cache_dir=settings.cache_dir)
        endpoint = Endpoint(own.server_url, own.server_timeout)
        try:
            # the server first: what it lacks is known before a tokenizer is read
            model = find_model(endpoint, spec, own.server_model)
            tokenizer: Any = load_tokenizer(spec, cache_dir=settings.cache_dir)
            said = require_tokenizer(endpoint, model, tokenizer)
            dialect = find_dialect(endpoint, model, tokenizer)
            made = ServerSession if dialect.scores is None else ScoringServerSession
            return made(spec, settings, endpoint, model, own.server_model, dialect, tokenizer, said)
        except BaseException:
            endpoint.close()
            raise

    def _ask(self, url: str) -> dict[str, str]:
        """What serves there, in a few seconds or not at all: a server that is not there is told of by its cases."""
        from .served_model import any_model, software

        endpoint = Endpoint(url, min(_VERSION_S, self._own.server_timeout))
        try:
            return {"software": software(endpoint, any_model(endpoint))}
        except (ServerFailed, Refused, UserError):
            return {}
        finally:
            endpoint.close()
