"""Provides the small transformers models with which these tests compare."""

from tests.hf_models import hf_config, make_hf, saved

__all__ = ["hf_config", "make_hf", "saved"]
