"""The kinds of dictionaries that folders hold: which class reads each.

The architectures of each kind are the tags of their settings: `lmmono.recipe.dictionary_settings`.
"""

DICTIONARY_KINDS = {
    "sae": "lmmono.dictionaries.sae:SAE",
    "classical": "lmmono.dictionaries.classical:Classical",
    "control": "lmmono.dictionaries.controls:Control",
    "imported": "lmmono.interop.interchange:Imported",
}
"""`module:class` by the kind that `dictionary.json` names."""
