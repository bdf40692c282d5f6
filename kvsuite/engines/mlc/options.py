"""Options of engine `mlc`."""

# no postponed annotations: an option that is written wrongly is an error where it stands

import re
from typing import Annotated

from kvsuite.options.option import Option, OptionGroup, path, whole_number

_OPTIMISATIONS = re.compile(r"O[0-3]|\w+=\w+(;\w+=\w+)*")


def optimisations(typed: str) -> str:
    """MLC's own spelling of what its compiler switches on; which names there are its version knows."""
    if _OPTIMISATIONS.fullmatch(typed.strip()) is None:
        raise ValueError("use O0 to O3, or names with values: cudagraph=1;flashinfer=0")
    return typed.strip()


class MlcOptions(OptionGroup, frozen=True, kw_only=True):
    """Where mlc_llm is, and how long it may take."""

    # fmt: off
    mlc_python: Annotated[str | None, Option(
        path, "",
        "Python interpreter whose environment has mlc_llm; without it this one.",
        example="/opt/mlc/bin/python",
    )]
    model_lib: Annotated[str | None, Option(
        path, "",
        "Library that mlc_llm compile made for MLC weights, in the place of our own: engine mlc.",
        example="model-vulkan.so",
    )]
    mlc_opt: Annotated[str | None, Option(
        optimisations, "",
        "What mlc_llm compile switches on, in its own words; without it its default (O2).",
        example="flashinfer=0;cublas_gemm=0;cudagraph=1",
    )]
    mlc_timeout: Annotated[int, Option(
        whole_number(1, 10**7), "300",
        "Seconds after which a start of mlc_llm serve, or requests sent together, are taken for hanging: the "
        "server is killed and the case fails.",
    )]
    mlc_compile_timeout: Annotated[int, Option(
        whole_number(1, 10**7), "3600",
        "Seconds that mlc_llm convert_weight or compile may take.",
    )]
    # fmt: on
