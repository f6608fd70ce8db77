"""FlexAttention as a benchmark may use it: compiled for every shape, or not at all.

Dynamo compiles a function for eight shapes. After that it runs the function uncompiled without a word, and
FlexAttention then computes all scores. Here the limit is far away, reaching it is an error, and so is FlexAttention's
warning that it runs without its kernel.
"""

from __future__ import annotations

import warnings
from typing import Any

_SHAPES = 512


def compile_or_raise(shapes: int = _SHAPES) -> None:
    """Makes an error of whatever lets FlexAttention run uncompiled. Called once a process, before anything is compiled.

    Args:
        shapes: the most shapes that a function is compiled for; one more raises, if it is compiled with `fullgraph`.
    """
    import torch._dynamo

    config = torch._dynamo.config
    setattr(config, "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit", shapes)
    warnings.filterwarnings("error", message="(?s).*unfused")


def compiled_flex(backend: str = "inductor", shapes: int = _SHAPES) -> Any:
    """Returns `flex_attention`, compiled anew for every shape. Called once a process, before anything is compiled.

    Args:
        backend: the compiler.
        shapes: the most shapes; one more raises.
    """
    compile_or_raise(shapes)
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=backend)
