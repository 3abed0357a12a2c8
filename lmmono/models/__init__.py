"""Networks and their named activations; importing this registers CRATE with the `Auto*` classes."""

from lmmono.models.crate import CrateConfig, CrateForCausalLM, CrateModel

__all__ = ["CrateConfig", "CrateForCausalLM", "CrateModel"]
