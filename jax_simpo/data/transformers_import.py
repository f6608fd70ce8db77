"""Imports transformers, which takes a second and brings torch along where torch is installed: so only when needed."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def import_transformers() -> ModuleType:
    """Imports transformers without its warning that PyTorch is missing, which nothing here needs."""
    former = os.environ.get(_QUIET)
    os.environ[_QUIET] = "1"
    try:
        return importlib.import_module("transformers")
    finally:
        if former is None:
            del os.environ[_QUIET]
        else:
            os.environ[_QUIET] = former
