"""Neuron analysis of language models; see README.md.

The public names stand in `__init__.pyi`, each imported when it is first used; `import lmmono` loads
no torch. What is used less often stands in the rooms: `lm.tasks.find_task`, `lm.interop.to_hooked`.
"""

from activation_store.exports import lazy_exports
from lmmono.auto_classes import register_lazily

register_lazily()
__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
