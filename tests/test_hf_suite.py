"""Hugging Face's own common suites on CRATE: `make hf-suite`, which fetches them first.

They come from the source distribution of the transformers that is installed. That has no tests of
generation: where LMMONO_HF_TESTS names a git checkout of transformers, those run too. Most of the
time goes into compiling; `make hf-suite ARGS='-k "not compil"'` leaves that out.
"""

import os
import sys
import types
import unittest
import warnings
from contextlib import suppress
from importlib import import_module
from unittest import mock

import pytest
import torch
from transformers.models.auto import modeling_auto

from lmmono.models.crate import CrateBaseModel, CrateConfig, CrateForCausalLM

FOLDER = os.environ.get("LMMONO_HF_TESTS")
if not FOLDER:
    pytest.skip("needs transformers' own tests: make hf-suite", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")


def part(name: str, attribute: str, stand_in: object) -> object:
    """Return something of transformers' tests, or a stand-in, since a part of them is not there."""
    with suppress(ImportError):
        return getattr(import_module(name), attribute)
    module = types.ModuleType(name)
    setattr(module, attribute, stand_in)
    sys.modules[name] = module
    return stand_in


sys.path.insert(0, FOLDER)
warnings.simplefilter("ignore")  # their marks are unknown here
part("tests.exporters.test_export", "ExportTesterMixin", type("NoExports", (), {}))
part("tests.utils.test_configuration_utils", "config_common_kwargs", {})
no_generation = type("NoGeneration", (), {})
Generation = part("tests.generation.test_utils", "GenerationTesterMixin", no_generation)
common = import_module("tests.test_modeling_common")
ConfigTester = import_module("tests.test_configuration_common").ConfigTester

TABLES = {
    "MODEL_MAPPING_NAMES": "CrateBaseModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "CrateForCausalLM",
}
SIZES = {"batch_size": 13, "seq_length": 7, "hidden_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "vocab_size": 99, "max_position_embeddings": 512}


class Tester:
    """What the suites ask for: sizes, a configuration, and inputs."""

    def __init__(self, **options: object) -> None:
        vars(self).update(SIZES)
        self.options, self.is_training = options, True

    def get_config(self) -> CrateConfig:
        """Return a small configuration."""
        sizes = {k: v for k, v in SIZES.items() if k not in ("batch_size", "seq_length")}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return CrateConfig(**sizes, **tokens, **self.options)

    def prepare_config_and_inputs_for_common(self) -> tuple[CrateConfig, dict[str, torch.Tensor]]:
        """Return a configuration and padded rows."""
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.tril(torch.ones_like(ids)),
        }


class TestCrate(common.ModelTesterMixin, Generation, unittest.TestCase):
    """CRATE as the paper has it."""

    all_model_classes = (CrateBaseModel, CrateForCausalLM)
    options: dict[str, object] = {}

    def setUp(self) -> None:
        """Make what the suites ask."""
        self.model_tester = Tester(**self.options)
        sizes = {"hidden_size": 32, "num_attention_heads": 2}
        self.config_tester = ConfigTester(self, config_class=CrateConfig, **sizes)
        # the suite makes labels for the classes that are named there
        for table, name in TABLES.items():
            known = mock.patch.dict(getattr(modeling_auto, table), {"crate": name})
            known.start()
            self.addCleanup(known.stop)

    def test_config(self) -> None:
        """Run the suite of configurations."""
        self.config_tester.run_common_tests()

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        """Check what the suite lets a model say for itself: one tensor per layer, no values."""
        heads = (batch_size, config.num_attention_heads, seq_length)
        for layer in past_key_values.layers:
            self.assertEqual(layer.keys.shape, (*heads, config.hidden_size // 2))
            self.assertEqual(layer.values.shape, (*heads, 0))
        self.assertEqual(len(past_key_values.layers), config.num_hidden_layers)


class TestCrateWithEveryOption(TestCrate):
    """CRATE with all that its configuration can add."""

    options = {"n_ista_steps": 3, "step_size": "lipschitz", "ista_skip": True}
    options |= {"untied_decoder": True, "separate_query": True, "learned_threshold": True}

    @pytest.mark.skip(reason="the step follows the random dictionary, and the suite wants it fixed")
    def test_init_weights_can_init_buffers(self) -> None:
        """Leave out: the power iteration's buffer is random where its dictionary is."""
