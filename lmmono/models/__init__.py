"""Networks and their named activations; importing this registers CRATE with the `Auto*` classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from activation_store.exports import lazy_exports
from lmmono.models import crate

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

AutoConfig.register("crate", crate.CrateConfig, exist_ok=True)
AutoModel.register(crate.CrateConfig, crate.CrateBaseModel, exist_ok=True)
AutoModelForCausalLM.register(crate.CrateConfig, crate.CrateForCausalLM, exist_ok=True)
