"""Fixtures: the small transformers models that these tests compare with."""

from tests.hf_models import hf_config, make_hf, saved

__all__ = ["hf_config", "make_hf", "saved"]
